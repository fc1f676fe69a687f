"""What the commands do; a module has the name of its command. Parsing and printing is in `cli/`."""
