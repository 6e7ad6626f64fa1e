"""The files of `modeling_capivara` that need no torch, without that package's own import, which takes seconds.

from capivara_search.model_files.text_cleaning_capivara import clean_text
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "modeling_capivara")]
