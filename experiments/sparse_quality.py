"""How well sparse attention does on the attention of trained models.

  python -m experiments.sparse_quality --workdir=DIR --lm=RUN --dit=RUN
  python -m experiments.sparse_quality --workdir=DIR --dit=RUN --sample

--lm is a directory of `experiments.pretrain`, --dit are directories of
`experiments.train_dit`. Every layer's queries, keys and values on held-out
data go through every choice of blocks (top-k, with the first block, with
PISA's covariance term, threshold, top-p, and an oracle that knows the
attention), with every tail, at several densities; beside them stand a sliding
window and the best tokens of each query, at the density that the top-k blocks
achieve, for images also raster order, and ISA's grouping of images with a
context and of text, whose first half is the context. The error is that of the
output, relative, by head.

With --sample whole models attend that way, which were trained to attend
fully: the DiTs draw the same samples with dense, piecewise and in-context
attention, and PSNR and SSIM say how near they stay to dense; the language
model's held-out loss is taken with dense and piecewise attention and windows.

Every layer is a line of --record; one that stands there already is not
measured again. At the end there are tables and, beside the record, a figure
of each source as PNG and SVG.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from absl import flags

from experiments import errors, reports
from experiments.sparse import measure, picture, sampling, sources, text_loss
from jaxlib_ext import records


@dataclasses.dataclass(frozen=True)
class Options:
  """What the flags say.

  Attributes:
    lm: run of a language model, or None.
    dit: runs of DiTs.
    sample: draw samples and take losses instead of measuring heads.
    examples: sequences or images of each source.
    block: tokens of a block of text.
    densities: of the choices.
    steps: of a sample.
    full_steps: of these, how many in front attend fully.
    record: JSON Lines file; figures lie beside it.
  """

  lm: pathlib.Path | None
  dit: tuple[pathlib.Path, ...]
  sample: bool
  examples: int
  block: int
  densities: tuple[float, ...]
  steps: int
  full_steps: int
  record: pathlib.Path

  def __post_init__(self):
    if not self.lm and not self.dit:
      raise errors.UserError("--lm, --dit: expected a directory of a run")
    for density in self.densities:
      if not 0 < density <= 1:
        raise errors.UserError(
          f"--densities: got {density:g}; allowed: shares above 0, at most 1"
        )
    if self.full_steps > self.steps:
      raise errors.UserError(
        f"--full_steps: got {self.full_steps}; allowed: at most --steps="
        f"{self.steps}"
      )


def measure_source(
  source: sources.Source, options: Options
) -> list[dict[str, Any]]:
  """The records of all layers; those that are missing are measured."""
  length, heads, size = source.q.shape[2:]
  total = len(source.q) * measure.count(source, options.densities)
  out = []
  with reports.progress(total, 0, True) as bar:
    for layer in range(len(source.q)):
      job = {
        "study": "heads",
        "source": source.name,
        "layout": source.layout,
        "layer": layer,
        "tokens": length,
        "heads": heads,
        "head_size": size,
        "block": source.block,
        "densities": list(options.densities),
        **source.facts,
      }
      record = records.find(records.read(options.record), job)
      if record:
        bar.total -= measure.count(source, options.densities)
      else:
        bar.set_description_str(f"{source.name} {source.layout} {layer}")
        facts, *results = _counted(
          measure.study(source, layer, options.densities), bar
        )
        record = {
          **job,
          "model": source.model,
          **facts,
          "results": results,
          **records.provenance(),
        }
        records.append(options.record, record)
      out.append(record)
  return out


def _counted(results, bar):
  for result in results:
    bar.update()
    yield result


def measure_heads(options: Options) -> None:
  """Measures, prints and draws one source after another."""
  found = []
  if options.lm:
    found.append(sources.text(options.lm, options.examples, options.block))
  for path in options.dit:
    found.append(sources.heads(sources.images(path, options.examples)))
  for source in found:
    results = picture.Results(measure_source(source, options))
    raster = None
    if source.tile:
      raster = picture.Results(measure_source(source.raster(), options))
    title = f"{source.name}, {source.layout}"
    print(picture.table(title, results), flush=True)
    if raster:
      print(picture.table(f"{source.name}, raster", raster), flush=True)
    name = f"{options.record.stem}_{source.name}"
    picture.draw(
      options.record.with_name(name),
      f"{source.name}: {len(source.q)} layers of {source.q.shape[3]} heads, "
      f"{source.q.shape[2]} tokens in blocks of {source.block}",
      results,
      raster,
    )


def take_losses(options: Options) -> None:
  """Takes, records and prints the language model's losses."""
  run = text_loss.load(options.lm, options.examples, options.block)
  job = {
    "study": "losses",
    "source": "text",
    "block": options.block,
    "densities": list(options.densities),
    "tokens": run.tokens.shape[1],
    **run.facts,
  }
  record = records.find(records.read(options.record), job)
  if not record:
    args = dict(block=options.block, densities=options.densities)
    total = len(text_loss.methods(run.tokens.shape[1], **args))
    with reports.progress(total, 0, True) as bar:
      results = text_loss.compare(run, **args, done=bar.update)
    record = {**job, "results": results, **records.provenance()}
    records.append(options.record, record)
  print("| text | exact share | held-out loss |\n|---|---|---|")
  for result in record["results"]:
    print(
      f"| {result['method']} | {result['share']:.3f} | {result['loss']:.4f} |"
    )


def draw_samples(options: Options) -> None:
  """Draws, records and prints the samples of every DiT."""
  for path in options.dit:
    examples = sources.images(path, options.examples)
    trained = examples.trained
    job = {
      "study": "samples",
      "source": trained.config.name,
      "step": trained.step,
      "data": trained.corpus.hash,
      "examples": options.examples,
      "steps": options.steps,
      "full_steps": options.full_steps,
    }
    name = f"{options.record.stem}_{trained.config.name}_samples"
    if options.full_steps:
      name += f"_{options.full_steps}"
    target = options.record.with_name(f"{name}.png")
    record = (
      records.find(records.read(options.record), job)
      if target.exists()
      else None
    )
    if not record:
      total = 1 + len(sampling.methods(trained.cfg))
      with reports.progress(total, 0, True) as bar:
        results = sampling.compare(
          examples,
          steps=options.steps,
          full_steps=options.full_steps,
          picture=target,
          done=bar.update,
        )
      record = {**job, "results": results, **records.provenance()}
      records.append(options.record, record)
    print(f"| {trained.config.name}, samples | density | PSNR | SSIM |")
    print("|---|---|---|---|")
    for result in record["results"]:
      print(
        f"| {result['method']} | {result['density']:.3f} | "
        f"{result['psnr']:.2f} | {result['ssim']:.4f} |"
      )


def main() -> None:
  """Reads the flags and measures or draws."""
  values = flags.FLAGS
  if not values.workdir and not values.record:
    raise errors.UserError("--workdir: expected a directory for the record")
  record = pathlib.Path(
    values.record or pathlib.Path(values.workdir) / "record.jsonl"
  )
  try:
    densities = tuple(float(x) for x in values.densities)
  except ValueError as e:
    raise errors.UserError(f"--densities: {e}") from e
  options = Options(
    lm=pathlib.Path(values.lm) if values.lm else None,
    dit=tuple(pathlib.Path(x) for x in values.dit),
    sample=values.sample,
    examples=values.examples,
    block=values.block,
    densities=densities,
    steps=values.steps,
    full_steps=values.full_steps,
    record=record,
  )
  record.parent.mkdir(parents=True, exist_ok=True)
  if options.sample:
    if options.lm:
      take_losses(options)
    draw_samples(options)
  else:
    measure_heads(options)


def _define_flags() -> None:
  flags.DEFINE_string("lm", None, "Directory of a run of pretrain.")
  flags.DEFINE_list("dit", [], "Directories of runs of train_dit.")
  flags.DEFINE_bool(
    "sample", False, "Compare whole models: samples and losses."
  )
  flags.DEFINE_integer("examples", 4, "Of each source.", lower_bound=1)
  flags.DEFINE_integer("block", 64, "Tokens of a block of text.", lower_bound=1)
  flags.DEFINE_list(
    "densities", ["0.05", "0.1", "0.15", "0.25", "0.5"], "Of the choices."
  )
  flags.DEFINE_integer("steps", 25, "Of a sample.", lower_bound=1)
  flags.DEFINE_integer(
    "full_steps", 0, "So many in front attend fully.", lower_bound=0
  )
  flags.DEFINE_string("workdir", None, "Where the record lies by default.")
  flags.DEFINE_string(
    "record", None, "JSON Lines file, appended to; default DIR/record.jsonl."
  )


if __name__ == "__main__":
  errors.run_main("sparse_quality", main, _define_flags)
