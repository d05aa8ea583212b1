"""Data sets of given rows in every form that problems are read from; each function returns the written set's source."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def write_hf_folder(path, rows):
    path.mkdir()
    write_parquet(path / "train-00000.parquet", rows)
    return f"hf:{path}"


def write_hf_disk(path, rows):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return f"hf:{path}"


def write_tfds(path, rows):
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Written(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                kinds = {int: tfds.features.Scalar(np.int64), str: tfds.features.Text()}
                features = {key: kinds[type(value)] for key, value in rows[0].items()}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, _):
                return {"train": enumerate(rows)}

            def _generate_examples(self):
                raise NotImplementedError

    builder = Written(data_dir=str(path), file_format="array_record")
    builder.download_and_prepare()
    return f"tfds:{builder.data_dir}"
