"""What can translate: models of transformers and Google's service; a table is of `captions.tsv`."""
