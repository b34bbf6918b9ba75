"""Presets of `icf train` and `icf evaluate`: one YAML file each, filling the dataclasses of `icf.config`."""
