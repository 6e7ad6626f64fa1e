"""Infer the license of a model from the licenses of its base model and training data, and check a stated license."""

from typing import Any

# Hub identifiers of licenses whose only condition for a derived work is that it keeps the copyright notices. A model
# that is made from a work with such a license may have any other license.
PERMISSIVE_LICENSES = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc", "mit", "ncsa", "pddl"}
PERMISSIVE_LICENSES |= {"postgresql", "unlicense", "zlib"}
# Licenses whose only condition for a derived work is that it names the author. The derived work may have a stricter
# license, such as a license for non-commercial use only.
ATTRIBUTION_LICENSES = {"cc-by-2.0", "cc-by-3.0", "cc-by-4.0"}


def infer_license(stated_licenses: list[list[str]]) -> str | None:
    """Infer the license of a model from the licenses of its base model and training datasets.

    If these licenses differ, the strictest license applies. Any other license is stricter than a permissive license
    such as "mit". A license that forbids commercial use is stricter than an attribution license such as "cc-by-4.0".

    Args:
        stated_licenses: For the base model and each dataset, the Hub identifiers of the licenses on its card.

    Returns:
        Hub identifier of the license. None if a card states no license, or no license is the strictest, for example
        with "cc-by-4.0" and "gpl-3.0".
    """
    if not all(stated_licenses):
        return None
    all_licenses = {license for licenses in stated_licenses for license in licenses}
    binding = all_licenses - PERMISSIVE_LICENSES or all_licenses
    if any(map(_is_non_commercial, binding)):
        binding -= ATTRIBUTION_LICENSES
    return binding.pop() if len(binding) == 1 else None


def _is_non_commercial(license: str) -> bool:
    """Return whether a license forbids commercial use.

    Args:
        license: Hub identifier of the license, such as "cc-by-nc-4.0".
    """
    return "nc" in license.split("-")


def check_stated_license(origins: dict[str, Any], stated: str | list[str] | None) -> None:
    """Check that a model is not licensed for commercial use if one of its sources forbids it.

    Args:
        origins: Value of "origins" in run.json: metadata of the base model ("model"), the training datasets
            ("datasets", a list) and the teacher model ("teacher"), each with "title" and "licenses". All keys are
            optional.
        stated: License on the model's card: a Hub identifier, a list of identifiers, or None.

    Raises:
        ValueError: If the stated license permits commercial use, but a source is licensed for non-commercial use only.
    """
    permissive = [license for license in as_texts(stated) if not _is_non_commercial(license)]
    datasets = origins.get("datasets")
    for work in [origins.get("model"), *(datasets if isinstance(datasets, list) else []), origins.get("teacher")]:
        licenses = as_texts(work.get("licenses")) if isinstance(work, dict) else []
        required = [license for license in licenses if _is_non_commercial(license)]
        if permissive and required:
            raise ValueError(
                f"The license {permissive[0]} permits commercial use, but the model was made from {work.get('title')}, "
                f"which is licensed {required[0]}. State {required[0]} instead."
            )


def as_texts(value: Any) -> list[str]:
    """Convert a value from a card's front matter (YAML header) to a list of strings.

    Values such as `license` may be written as a single value or as a list.

    Args:
        value: A single value or a list of values. Empty values and None are left out of the result.
    """
    return [str(text) for text in (value if isinstance(value, list) else [value]) if text]
