"""Uploads, checked in a process with limits."""
