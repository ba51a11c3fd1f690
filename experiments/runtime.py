"""What XLA must be told before JAX starts. Only mains and the tests' conftest call this; the library never does.

XLA reads its flags once, at the first computation, and aborts the process on a flag that it does not know.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import warnings

ONEDNN = '--xla_cpu_experimental_onednn_custom_call=true'
# For virtual devices; both are known since before JAX 0.10.
PATIENCE = '--xla_cpu_collective_call_terminate_timeout_seconds=600'
ONE_ORDER = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
HASTY = '--xla_backend_optimization_level=0'

# Run in a process of its own, as the answer to an unknown flag is SIGABRT: is the product right that the flag replaces?
_TRIAL = """
import jax, jax.numpy as jnp
a = (jnp.arange(64 * 96) % 7 - 3).reshape(64, 96).astype(jnp.bfloat16)
b = (jnp.arange(64 * 80) % 5 - 2).reshape(64, 80).astype(jnp.bfloat16)
product = jax.jit(lambda a, b: a.T @ b)(a, b).astype(jnp.float32)
exact = a.astype(jnp.float32).T @ b.astype(jnp.float32)
assert jnp.max(jnp.abs(product - exact)) <= 0.01 * jnp.max(jnp.abs(exact))
"""


def prepare(cache_dir: str | os.PathLike | None = None, *, bfloat16: bool = False):
  """Compiled programs kept from run to run, and faster gradients in bfloat16 where the chip and JAX have them.

  Args:
    cache_dir: where verdicts and compiled programs are kept; None takes $XDG_CACHE_HOME/srm_jax or ~/.cache/srm_jax.
      A folder that cannot be written costs time in later runs, nothing else.
    bfloat16: whether a training may compute in it. The faster products are those of weight gradients; programs that
      have them take longer to compile and cannot be kept, and in float32 they are no faster.
  """
  if 'JAX_PLATFORMS' not in os.environ and _tpu_compiler_only():
    os.environ['JAX_PLATFORMS'] = 'cpu'
  home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  cache = pathlib.Path(cache_dir or pathlib.Path(home, 'srm_jax')).expanduser()
  wanted = bfloat16 and not _set_already('xla_cpu_experimental_onednn_custom_call') and _worth_trying()
  if wanted and _accepted(ONEDNN, cache):
    _add_flag(ONEDNN)
    warnings.filterwarnings('ignore', 'Error writing persistent compilation cache entry .*bad_alloc')
  _keep_compiled_programs(cache / 'xla')


def join_hosts(hosts: str):
  """Makes this process one of several that run the same command.

  Args:
    hosts: 'auto' where the environment of a cluster tells JAX (a Cloud TPU slice, GKE, Slurm), or
      'ADDRESS:PORT,COUNT,INDEX'.

  Raises:
    ValueError: neither, or an index that is not below the count.
  """
  import jax

  if hosts == 'auto':
    return jax.distributed.initialize()
  found = re.fullmatch(r'([^,]+:\d+),(\d+),(\d+)', hosts)
  if not found or int(found[3]) >= int(found[2]):
    raise ValueError(f"--hosts={hosts}: expected 'auto', or ADDRESS:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1")
  return jax.distributed.initialize(found[1], int(found[2]), int(found[3]))


def set_virtual_devices(count: int):
  """Makes the CPU look like `count` devices, in place of an earlier count; other flags stay.

  The devices share the cores: on a busy machine one may reach a collective long after another, and XLA by default
  aborts the process when 40 seconds lie between them. And they share its threads: where collectives do not depend on
  one another, as with many terms of a loss, a scheduler that puts concurrency first has devices wait in different ones
  until no thread is left (seen whenever such a program came from the cache of compiled ones).
  """
  flags = re.sub(r'--xla_force_host_platform_device_count=\S*', '', os.environ.get('XLA_FLAGS', ''))
  os.environ['XLA_FLAGS'] = ' '.join([*flags.split(), f'--xla_force_host_platform_device_count={count}'])
  for flag in (PATIENCE, ONE_ORDER):
    if not _set_already(flag.split('=')[0].removeprefix('--')):
      _add_flag(flag)


def compile_hastily():
  """A third of the time to compile, and slower programs: for many of them that compute little, as tests and smoke runs
  have. It concerns code for the CPU alone; an optimisation level of the user's stays.
  """
  if not _set_already('xla_backend_optimization_level'):
    _add_flag(HASTY)


def _tpu_compiler_only() -> bool:
  """libtpu is there for `experiments.plan`, but no TPU or GPU: JAX would look for the chip, and complain."""
  devices = ('/dev/accel0', '/dev/vfio', '/dev/nvidia0', '/dev/kfd')
  return importlib.util.find_spec('libtpu') is not None and not any(map(os.path.exists, devices))


def _set_already(name: str) -> bool:
  return re.search(rf'--{name}(=|\s|$)', os.environ.get('XLA_FLAGS', '')) is not None


def _add_flag(flag: str):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()


def _chip() -> str:
  """/proc/cpuinfo's lines on the first core; '' off Linux."""
  try:
    return pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8').split('\n\n')[0]
  except OSError:
    return ''


def _worth_trying() -> bool:
  """Without AMX the flag was measured to change nothing, and before JAX 0.12 to be slower."""
  version = tuple(int(part) for part in re.findall(r'\d+', importlib.metadata.version('jax'))[:2])
  return version >= (0, 12) and re.search(r'\bamx_bf16\b', _chip()) is not None


def _accepted(flag: str, cache: pathlib.Path) -> bool:
  """Whether a process with the flag multiplies rightly; asked once per flag, jaxlib and chip."""
  chip = re.sub(r'.*(MHz|bogomips|apicid|processor|core id|physical id).*\n?', '', _chip())
  where = '\n'.join([flag, importlib.metadata.version('jaxlib'), sys.version, chip])
  key = hashlib.sha256(where.encode()).hexdigest()[:16]
  verdict = cache / f'flag-{key}'
  if verdict.exists():
    return verdict.read_text() == 'accepted'
  accepted = _try(flag)
  try:
    cache.mkdir(parents=True, exist_ok=True)
    verdict.write_text('accepted' if accepted else 'refused')
  except OSError:
    pass
  return accepted


def _try(flag: str) -> bool:
  environment = os.environ | {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
  try:
    trial = subprocess.run([sys.executable, '-c', _TRIAL], env=environment, capture_output=True, timeout=60)
  except (OSError, subprocess.TimeoutExpired):
    return False
  return trial.returncode == 0


def _keep_compiled_programs(folder: pathlib.Path):
  """JAX reads the variable when it is imported; a JAX that is there already is told as well."""
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  if 'jax' in sys.modules:
    sys.modules['jax'].config.update('jax_compilation_cache_dir', str(folder))
