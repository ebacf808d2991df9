"""The commands, a module a topic: parse, call the library, print. cli.py lists them."""
