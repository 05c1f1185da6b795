"""Foreign formats, one a file."""

from ditloom.contracts.registry import Registry

FORMATS = Registry("checkpoint format", "ditloom.hub.formats")
