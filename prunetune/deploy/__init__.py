"""The old place of `prunetune.export`, for what names it: models that earlier versions logged."""
