"""The built-in data sources, one module per source; `data.name` chooses one."""
