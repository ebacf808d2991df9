"""The commands, one file each: parse, call the library, print. app.py puts them together."""
