"""How outcomes are shown: text for terminals, one HTML file for browsers."""
