"""One candidate built, checked and timed, in a process that may die of it."""
