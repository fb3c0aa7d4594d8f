"""The front door: OpenAI-style HTTP for many tenants over a fleet of engines. Needs neither torch
nor vLLM.
"""
