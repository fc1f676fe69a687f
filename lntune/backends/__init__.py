"""Kinds of devices: all that differs between them, one folder a kind, behind the interface of
`backend.py`.
"""
