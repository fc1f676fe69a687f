"""The tuning log: what a record is, how it is written and read, and which one serves a call."""
