"""What calibration saw and what every option costs in accuracy: made once, kept on disk, used by every candidate."""
