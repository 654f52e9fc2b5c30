"""What the scripts stand on: formats and sources. Downloads and prepared text lie beside it."""
