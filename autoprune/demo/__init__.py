"""The embedded demo: a small residual network and the handwritten digits it reads, both shipped with the package."""
