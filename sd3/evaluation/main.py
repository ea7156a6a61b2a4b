"""The command line of the evaluation. What is heavy is imported when the flags are known to be good."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sd3.common.command_line import UserError
from sd3.common.devices import DeviceError
from sd3.evaluation.baseline import write_training_rows
from sd3.evaluation.options import Defaults, parse
from sd3.evaluation.painting import GenerationFailed, Inference


def main(arguments: Sequence[str], defaults: Defaults, inference: Inference | None = None) -> int:
    """Run the command line; returns the exit status. `inference` stands in for the project's own."""
    try:
        options = parse(arguments, defaults)
        if options.training_split:
            write_training_split(options)
        else:
            from sd3.evaluation.run import evaluate

            evaluate(options, inference or Inference())
    except (UserError, DeviceError) as error:
        print(error, file=sys.stderr)
        return error.status if isinstance(error, UserError) else 2
    except GenerationFailed as error:
        return error.status
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is there.", file=sys.stderr)
        return 130
    return 0


def write_training_split(options: argparse.Namespace) -> None:
    """Write the rows that are not held out as a data set of their own, and say how many.

    Raises:
        UserError: the data set cannot be read, or the directory cannot be made.
    """
    rows = write_training_rows(
        options.dataset, options.training_split, options.held_out, options.split_seed, options.caption_column
    )
    print(f"{rows} rows to train on: {options.training_split}")
