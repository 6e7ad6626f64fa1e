"""Import files of `modeling_capivara` without importing that package, which loads torch and takes seconds.

The search path of this package is the folder of `modeling_capivara`, so each file there is a module of this package,
too. Only files that do not need torch can be imported in this way:

    from capivara_search.model_files.text_cleaning_capivara import clean_text
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "modeling_capivara")]
