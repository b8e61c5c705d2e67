"""The commands of the command line, by what they are about. All work is done behind one door (`app.api`)."""
