"""The tables and the picture of docs/benchmarks.md that show the search, out of benchmarks/results/search.json."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.timing import median_ratio, software, table

PROGRAMS = {
    "index": "CAPIVARA's index",
    "faiss_flat": "faiss, flat",
    "faiss_ivfpq": "faiss, IVF-PQ",
    "semantic_search": "sentence-transformers, semantic_search",
}
PHOTO_PROGRAMS = {
    "open_clip": "open_clip's plain loop",
    "index": "`capivara index`",
    "index_exact": "`capivara index ~/Fotos --exact`",
}


def search_table(results: dict[str, Any]) -> str:
    """All programs at the largest size."""
    rows, largest = [], str(results["peer_rows"])
    for name, found in {"index": results["index"][largest], **results["peers"]}.items():
        built = found.get("built_s", found.get("optimised_s"))
        rows.append(
            (
                PROGRAMS[name], f"{found['vector_ms']['p50']:.1f}", f"{found['vector_ms']['p95']:.1f}",
                f"{found['recall']:.3f}", f"{found['memory_bytes'] / 1e9:.2f}", f"{found['bytes'] / 1e9:.2f}",
                f"{built:.0f}",
            )
        )  # fmt: skip
    first = statistics.median(results["first_search_s"])
    facts = (
        f"{results['peer_rows']:,} made vectors of {results['width']} numbers, {results['queries']} as queries; "
        f"recall@{results['k']} against comparing all in float32; memory is the most that the searching process has "
        "held, with its libraries; sentence-transformers and the flat index keep float32, ours float16 and, on the "
        "disk, the facts of the pictures (without thumbnails, about 5 kB each). The first `capivara search` of a new "
        f"process, text tower of the full published size: {first:.1f} s, median of {len(results['first_search_s'])}. "
        f"{results['device']}, {results['threads']} threads; "
        f"{software(results, 'lancedb', 'faiss-cpu', 'sentence-transformers', 'torch')}."
    )
    heads = ("program", "p50, ms", "p95, ms", "recall", "memory, GB", "disk, GB", "built in, s")
    return table(heads, rows, facts)


def growth_table(results: dict[str, Any]) -> str:
    """Ours from the smallest to the largest size."""
    rows = []
    for size, found in results["index"].items():
        added = {int(count): one for count, one in found["added_s"].items()}
        one, many = added[1], added.get(1000)
        rows.append(
            (
                f"{int(size):,}", "approximate" if found["approximate"] else "exact",
                f"{found['vector_ms']['p50']:.1f}", f"{found['vector_ms']['p95']:.1f}",
                f"{found['text_ms']['p50']:.0f}", f"{found['text_ms']['p95']:.0f}", f"{found['recall']:.3f}",
                f"{found['memory_bytes'] / 1e9:.2f}", f"{one['seconds']:.2f}",
                f"{many['seconds']:.0f} ({many['image_tower_s']:.0f})" if many else "–",
            )
        )  # fmt: skip
    heads = (
        *("pictures", "search", "p50, ms", "p95, ms", "with text, p50", "p95", "recall", "memory, GB"),
        *("one added, s", "a thousand, s (of them the image tower)"),
    )
    facts = (
        "Added are JPEG files of 640 x 480 pixels, by the full-size image tower in float32, in a process that has it "
        f"loaded; one picture: median of {results['runs']} after a first one, which took "
        + ", ".join(f"{one['added_s']['1']['first_s']:.2f}" for one in results["index"].values())
        + " s."
    )
    return table(heads, rows, facts, 2)


def photos_table(results: dict[str, Any]) -> str:
    """Photographs a second into an index."""
    found = results["photographs"]
    seconds, count = found["seconds"], found["photographs_a_run"]
    rows = []
    for name, title in PHOTO_PROGRAMS.items():
        rate = statistics.median(count / s for s in seconds[name])
        cosine = found["cosine_to_open_clip"].get(name)
        near = f"{cosine['lowest']:.5f}" if cosine else "–"
        rows.append(
            (
                title,
                f"{rate:.1f}",
                f"{median_ratio(seconds['open_clip'][: len(seconds[name])], seconds[name]):.2f}",
                near,
            )
        )
    facts = (
        f"{found['photographs']:,} JPEG files of {found['megapixels']:.0f} megapixels, {found['megabytes_each']:.1f} "
        f"MB each, made from real ones; {len(seconds['index'])} alternating runs of {count} each, full size, random "
        f"weights, float32, `--exact` in the first run alone, on {found['device']}, {found['threads']} threads; "
        "the cosine is that of the least similar vector to open_clip's, and an index keeps float16."
    )
    return table(("program", "photographs/s", "ratio", "lowest cosine"), rows, facts)


def reduced_table(results: dict[str, Any]) -> str:
    """How much of an embedding the decoding at a reduced size leaves, by noise."""
    found = results["reduced"]
    rows = [(noise, f"{one['lowest']:.5f}", f"{one['mean']:.5f}") for noise, one in found["cosine_by_noise"].items()]
    facts = (
        f"{found['photographs']} photographs of 12 megapixels for each row, the same but for the noise in every pixel, "
        f"by the trained image tower of the {found['model']}: embeddings by default and with `--exact`, cosine of the "
        f"least similar pair and the mean; {software(found, 'torch', 'pillow')}."
    )
    return table(("noise, standard deviation in levels of 255", "lowest cosine", "mean"), rows, facts)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """How time, memory, disk and adding grow with the pictures; both axes are logarithmic and say so."""
    import matplotlib.pyplot as plt

    from eval.records.plots import save_figure, tidy

    sizes = sorted(map(int, results["index"]))
    of = [results["index"][str(size)] for size in sizes]
    panels = {
        "One query by a vector, ms": {
            "median": [one["vector_ms"]["p50"] for one in of],
            "95th percentile": [one["vector_ms"]["p95"] for one in of],
        },
        "Gigabytes": {
            "memory of the searching process": [one["memory_bytes"] / 1e9 for one in of],
            "disk": [one["bytes"] / 1e9 for one in of],
        },
        "Adding one picture, s": {"the image tower included": [one["added_s"]["1"]["seconds"] for one in of]},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for label, values in lines.items():
            axis.plot(sizes, values, "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel="pictures (logarithmic)", title=f"{title} (logarithmic)")
        axis.legend(frameon=False)
        tidy(axis, "both", "top", "right")
    save_figure(figure, path)
