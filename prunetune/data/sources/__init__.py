"""Where data come from: a file per source, by the name in `data.name`."""
