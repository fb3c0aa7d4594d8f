"""Rows that outlive the processes: tenants, keys, adapters and their versions, usage, audit. No
HTTP, no torch.
"""
