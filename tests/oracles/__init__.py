"""Independent references the library is checked against; they share no code with it."""
