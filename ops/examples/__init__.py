"""Agents that ask a person before they act: copy one, and put your own model and tools in it.

They reach Muniment by the Python client alone, and nothing else imports them. The frameworks that two of them are
written for are no dependency of Muniment: they are the dependency group `examples` in pyproject.toml.
"""
