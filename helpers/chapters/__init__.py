"""The first five chapters of a study, whose table of contents is study.py."""
