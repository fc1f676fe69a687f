"""Candidates that are built here and measured on a machine that has no compiler: a folder with all
it takes goes there (`export`), is measured there (`measure`), and its records come home (`home`).
"""
