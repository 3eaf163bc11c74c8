"""`wsi-idc model`: which models there are, other people's models, and ours in other people's tools."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wsi_idc import USE
from wsi_idc.cli.options import DEFAULT_STORE, JsonOption, StoreOption, console_for
from wsi_idc.errors import UsageError

if TYPE_CHECKING:
    from wsi_idc.model.bundle import LoadedBundle

app = typer.Typer(
    help="Models: list, show, import, export, check.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

BundleArgument = Annotated[
    Path | None, typer.Argument(help="A model bundle's folder. [default: the one that ships]", metavar="BUNDLE")
]
ModelsOption = Annotated[
    Path | None, typer.Argument(envvar="WSI_IDC_MODELS", help="Also the bundles in this folder.", metavar="DIR")
]


@app.command("list")
def list_models(
    models: ModelsOption = None, store: StoreOption = DEFAULT_STORE, json_lines: JsonOption = False
) -> None:
    """List the models at hand, and those with maps in the store."""
    console = console_for(json_lines=json_lines)
    from wsi_idc.catalogue import bundles_at_hand, stored_models
    from wsi_idc.store import find_store, open_store

    at_hand = bundles_at_hand(models)
    rows = []
    for listed, _ in at_hand:
        console.record("model", **listed.fields())
        threshold = "" if listed.threshold is None else f"{listed.threshold:.3f}"
        context = "with neighbours" if listed.context else ""
        about = [listed.tile, ", ".join(listed.classes), threshold, context]
        rows.append([listed.name, *about, listed.where if not listed.fault else f"{listed.where}: {listed.fault}"])
    console.table(["model", "tiles", "classes", "threshold", "context", "where"], rows)
    found = find_store(store) if store == DEFAULT_STORE else open_store(store)
    if found is None:
        return
    rows = []
    for stored in stored_models(found, at_hand):
        console.record("maps", store=found.address, **stored.fields())
        counts = [f"{stored.current:,}", f"{stored.stale:,}", f"{stored.failed:,}", f"{stored.slides:,}"]
        rows.append([stored.name, *counts, stored.bundle or "the tiles alone: no bundle of that name at hand"])
    console.line(f"\nMaps in {found.address}:" if rows else f"\nNo maps in {found.address}.")
    if rows:
        console.table(["model", "current", "stale", "failed", "of slides", "held against"], rows)


@app.command()
def show(bundle: BundleArgument = None, json_lines: JsonOption = False) -> None:
    """Show what a bundle is: tiles, classes, threshold, context, forms, figures, and where its card is."""
    console = console_for(json_lines=json_lines)
    loaded = _read(bundle)
    from wsi_idc.catalogue import form_names
    from wsi_idc.model.bundle import PATIENT_LISTS

    fields = loaded.fields
    training = fields.training
    counts = {name: len(fields.patients(name)) for name in PATIENT_LISTS if name in training}
    card = loaded.folder / "CARD.md"
    positive = None if fields.positive_index is None else fields.classes[fields.positive_index]
    about: dict[str, Any] = {
        "name": fields.name,
        "title": fields.title,
        "folder": str(loaded.folder),
        "tiles": f"{fields.tile.size_px} px at {fields.tile.mpp:g} um/px",
        "classes": ", ".join(fields.classes),
        "positive class": positive or "none",
        "threshold of the maps": "none" if fields.operating_point is None else f"{fields.operating_point:.3f}",
        "threshold of a tile alone": "none" if positive is None else f"{fields.threshold:.3f}",
        "context": "none" if fields.context is None else _words(fields.context.model_dump()),
        "network": "none: a graph alone" if fields.network is None else _words(fields.network),
        "known answers": "none" if fields.known is None else f"{len(fields.known.probability)} made tiles",
        "licence": fields.licence or "not said",
        "card": str(card) if card.is_file() else "none",
    }
    for name, count in counts.items():
        about[name.replace("_", " ")] = str(count)
    for form in form_names(loaded):
        about.setdefault("forms", []).append(form)
    digests = {path.name: digest for path, digest in loaded.files()}
    if json_lines:
        console.record("model", **about, digests=digests, fields=fields.model_dump(mode="json"))
        return
    width = max(map(len, about))
    for name, value in about.items():
        console.line(f"{name:{width}}  {', '.join(value) if isinstance(value, list) else value}")
    for name, digest in digests.items():
        console.line(f"{'file':{width}}  {name}, digest {digest}")
    for limit in _texts(training.get("limits")):
        console.line(f"{'limit':{width}}  {limit}")
    rows = _figure_rows(training.get("figures"))
    if rows:
        console.line("")
        console.table([f"figure on {training.get('figures_on', 'unknown tiles')}", "value", "95 % interval"], rows)
    if USE not in _texts(training.get("limits")):
        console.line(USE)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A WSInfer folder, a .safetensors file or an .onnx file.")],
    out: Annotated[
        Path | None, typer.Option(help="The bundle to write. [default: its name, here]", metavar="BUNDLE")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The bundle's name. [default: that of --out, or of the source]")
    ] = None,
    title: Annotated[str | None, typer.Option(help="A line about it.")] = None,
    licence: Annotated[str | None, typer.Option(help="Its licence, for the card.")] = None,
    tile_size: Annotated[int | None, typer.Option(help="Side of its tiles, pixels.")] = None,
    mpp: Annotated[float | None, typer.Option(help="um/px of its tiles.")] = None,
    resize: Annotated[int | None, typer.Option(help="Side that the network sees. [default: the tile's]")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names in the order of its output: non-IDC,IDC.", metavar="NAMES")
    ] = None,
    positive: Annotated[str | None, typer.Option(help="The class that counts. [default: the second of two]")] = None,
    threshold: Annotated[float | None, typer.Option(help="Of its probability. [default: 0.5]")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Subtracted from the channels; 0,0,0: nothing.", metavar="R,G,B")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Divides the channels; 1,1,1: nothing.", metavar="R,G,B")] = None,
    white: Annotated[int | None, typer.Option(help="What 255 is before that: 1 or 255. [default: 1]")] = None,
    channels: Annotated[str | None, typer.Option(help="rgb or bgr. [default: rgb]")] = None,
    layout: Annotated[str | None, typer.Option(help="nchw or nhwc. [default: what the graph's shape says]")] = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="What its numbers need to be probabilities: sigmoid, softmax or none. [default: sigmoid for one, "
            "softmax for several, none where the graph ends in either]"
        ),
    ] = None,
    output_name: Annotated[str | None, typer.Option(help="Which output of a graph that has several.")] = None,
    architecture: Annotated[str | None, typer.Option(help="Of weights: a name of timm, such as resnet50.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Run TorchScript, which is code, once.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle if it is there.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Make a bundle of another program's model, hold it against the original, and refuse what differs."""
    console = console_for(json_lines=json_lines)
    chosen: dict[str, Any] = {
        "white": _one_of("--white", white, (1, 255)),
        "channels": _one_of("--channels", channels, ("rgb", "bgr")),
        "layout": _one_of("--layout", layout, ("nchw", "nhwc")),
        "output": _one_of("--output", output, ("sigmoid", "softmax", "none")),
        "mean": _three("--mean", mean),
        "std": _three("--std", std),
    }
    from wsi_idc.model.foreign import ImportOptions
    from wsi_idc.model.importing import import_model

    options = ImportOptions(
        name=name,
        title=title,
        licence=licence,
        architecture=architecture,
        classes=None if classes is None else tuple(part.strip() for part in classes.split(",")),
        positive=positive,
        threshold=threshold,
        tile_px=tile_size,
        mpp=mpp,
        resize_px=resize,
        output_name=output_name,
        trust=trust,
        **chosen,
    )
    done = import_model(source, out, options, force=force)
    console.record(
        "imported", bundle=str(done.folder), name=done.name, difference=done.difference, notes=list(done.notes)
    )
    for note in done.notes:
        console.line(f"note: {note}")
    console.line(f"held against the original on made tiles: a probability differs by at most {done.difference:.2g}")
    console.line(f"wrote {done.folder}: use it with --model {done.folder}. {USE}")


@app.command()
def export(
    bundle: BundleArgument = None,
    out: Annotated[
        Path, typer.Option(help="The folder of WSInfer models, QuPath's or a new one.", metavar="DIR")
    ] = Path("wsinfer"),
    force: Annotated[bool, typer.Option("--force", help="Replace the model if it is there.")] = False,
    json_lines: JsonOption = False,
) -> None:
    """Write a bundle as a model for QuPath's WSInfer extension, and for WSInfer."""
    console = console_for(json_lines=json_lines)
    loaded = _read(bundle)
    from wsi_idc.model.exporting import export_model

    done = export_model(loaded, out, force=force)
    console.record("exported", folder=str(done.folder), difference=done.difference, notes=list(done.notes))
    for note in done.notes:
        console.line(f"note: {note}")
    console.line(f"held against the bundle on made tiles: a probability differs by at most {done.difference:.2g}")
    console.line(f"wrote {done.folder}: its README.md says where QuPath wants it. {USE}")


@app.command()
def check(
    bundle: BundleArgument = None,
    threads: Annotated[int, typer.Option(min=0, max=256, help="CPU threads; 0: one a core.")] = 0,
    json_lines: JsonOption = False,
) -> None:
    """Run every form of a bundle on tiles of known answer: how fast, and whether they agree; exit 1 where not."""
    console = console_for(json_lines=json_lines)
    loaded = _read(bundle)
    from wsi_idc.model.check import check_bundle

    done = check_bundle(loaded, threads)
    rows = []
    for found in done.forms:
        form = found.form
        console.record(
            "form",
            file=form.file,
            engine=form.engine,
            precision=form.precision,
            device=form.device,
            tiles_per_second=None if found.rate is None else round(found.rate, 1),
            largest_difference=found.largest,
            mean_difference=found.mean,
            allowed=found.tolerance,
            fault=found.fault,
        )
        told = [
            "" if value is None else f"{value:{shape}}"
            for value, shape in ((found.rate, ",.0f"), (found.largest, ".2g"), (found.mean, ".2g"))
        ]
        how = [form.file, form.precision, form.engine, form.device]
        rows.append([*how, *told, f"{found.tolerance:g}", "no" if found.fault else "yes"])
    header = ["file", "precision", "engine", "on", "tiles/s", "largest difference", "mean", "allowed", "ok"]
    console.table(header, rows)
    console.record("checked", against=done.against, passed=done.passed, notes=list(done.notes))
    console.line(f"held against {done.against or 'nothing'}")
    for note in done.notes:
        console.line(f"note: {note}")
    for found in done.forms:
        if found.fault:
            console.trouble(f"failed {found.form.file} in {found.form.precision}: {found.fault}")
    if not done.passed:
        raise typer.Exit(1)


def _read(bundle: Path | None) -> "LoadedBundle":
    from wsi_idc.model.bundle import SHIPPED, read_bundle

    return read_bundle(bundle or SHIPPED)


def _one_of(option: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value is not None and value not in known:
        *some, last = map(str, known)
        raise UsageError(option, f"{value!r} is not known", f"give {', '.join(some)} or {last}")
    return value


def _three(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or not all(abs(number) < 1e6 for number in numbers):
        raise UsageError(option, f"{text!r}: three numbers are needed", "for instance 0.485,0.456,0.406")
    return numbers


def _words(values: dict[str, Any]) -> str:
    told = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in told.items())


def _texts(values: Any) -> list[str]:
    """Other people's lists: only what is text."""
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _figure_rows(figures: Any) -> list[list[str]]:
    """Figures with intervals, where the bundle has them in the form that `train` writes."""
    if not isinstance(figures, dict):
        return []
    rows = []
    for name, values in figures.items():
        numbers = values if isinstance(values, list) else [values]
        told = ["unknown" if not isinstance(number, int | float) else f"{number:.3f}" for number in numbers[:3]]
        rows.append([str(name), told[0] if told else "unknown", " to ".join(told[1:])])
    return rows
