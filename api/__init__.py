"""How you reach it: HTTP in, commands and views behind it."""
