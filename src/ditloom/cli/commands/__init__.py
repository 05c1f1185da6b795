"""The commands, one a file."""

from ditloom.contracts.registry import Registry

COMMANDS = Registry("command", "ditloom.cli.commands")
