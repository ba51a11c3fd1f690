"""Notebooks are committed executed, and still run from top to bottom."""

import json
import os
import pathlib
import shutil

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))


def cells(path):
  return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_executed(path):
  assert [cell['execution_count'] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
  kinds = {output['output_type'] for cell in cells(path) for output in cell['outputs']}
  assert kinds and 'error' not in kinds
  assert str(pathlib.Path.home()) not in path.read_text() and '/tmp/' not in path.read_text()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Looks like the repository and has no runs: the first notebook makes a smoke run there, the others find it."""
  made = tmp_path_factory.mktemp('repository')
  for name in ('srm_jax', 'experiments', 'configs'):
    (made / name).symlink_to(ROOT / name)
  shutil.copytree(ROOT / 'notebooks', made / 'notebooks')
  return made / 'notebooks'


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder):
  """As users start it, on one device and with optimised programs: some train in earnest."""
  nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
  notebook = nbformat.read(folder / path.name, as_version=4)
  nbclient.NotebookClient(
      notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(folder)}},
      extra_arguments=['--Application.log_level=50'], env=os.environ | {'XLA_FLAGS': ''},
  ).execute()
  assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')
