"""The commands of the command line, one file each; `palimpsest.cli` puts them together."""
