# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, read from the sources; see CONTRIBUTING.md."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
OURS = ("unisparse_jax", "pallas_kernels", "experiments", "configs", "tests")
# A module may import these of ours, beside its own folder.
ALLOWED = {
  "pallas_kernels": ("pallas_kernels",),
  "unisparse_jax.attention": ("pallas_kernels",),
  "unisparse_jax.tasks": (),
  "unisparse_jax.data": ("unisparse_jax.tasks",),
  "unisparse_jax.models": ("pallas_kernels", "unisparse_jax.attention"),
  "unisparse_jax.speculative": (
    "pallas_kernels",
    "unisparse_jax.attention",
    "unisparse_jax.models",
  ),
  "unisparse_jax.training": (
    "pallas_kernels",
    "unisparse_jax.attention",
    "unisparse_jax.models",
    "unisparse_jax.records",
    "unisparse_jax.speculative",
  ),
  "unisparse_jax.evaluation": (
    "pallas_kernels",
    "unisparse_jax.attention",
    "unisparse_jax.models",
    "unisparse_jax.tasks",
    "unisparse_jax.timing",
  ),
  "unisparse_jax.mcmc": (),
  "unisparse_jax.records": (),
  "unisparse_jax.timing": (),
  "experiments": ("unisparse_jax", "pallas_kernels"),
  "configs": (),
}
# Packages that library code must not import: they belong to experiments.
EXPERIMENT_ONLY = ("absl", "ml_collections", "matplotlib")


def imports_of(path):
  """Dotted names of all modules that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield f"{node.module}.{alias.name}"


def sources():
  for package in ("unisparse_jax", "pallas_kernels", "experiments", "configs"):
    for path in sorted((ROOT / package).rglob("*.py")):
      relative = path.relative_to(ROOT).with_suffix("")
      yield path, ".".join(relative.parts)


def is_inside(name, package):
  return name == package or name.startswith(package + ".")


def violations(name, imported, rules):
  rule = max((r for r in rules if is_inside(name, r)), key=len, default=None)
  for target in imported:
    if not target.startswith(OURS) or rule is None:
      continue
    allowed = (rule, "unisparse_jax.version", *rules[rule])
    if not any(is_inside(target, a) for a in allowed):
      yield f"{name} imports {target}"


def test_layers():
  found = []
  for path, name in sources():
    found += violations(name, imports_of(path), ALLOWED)
  assert not found


def test_the_rule_can_fail():
  bad = ["unisparse_jax.models.decoder", "unisparse_jax.attention.dense"]
  assert len(list(violations("unisparse_jax.mcmc.base", bad, ALLOWED))) == 2
  assert list(violations("pallas_kernels.api", bad, ALLOWED))


def test_ops_do_not_import_one_another():
  for path, name in sources():
    if name.startswith("pallas_kernels.") and name.count(".") == 2:
      folder = name.split(".")[1]
      for target in imports_of(path):
        parts = target.split(".")
        if parts[0] == "pallas_kernels" and len(parts) > 2:
          is_shared = (ROOT / "pallas_kernels" / f"{parts[1]}.py").exists()
          assert parts[1] == folder or is_shared, f"{name} imports {target}"


def test_library_stays_free_of_experiment_packages():
  for path, name in sources():
    if name.startswith(("unisparse_jax", "pallas_kernels")):
      for target in imports_of(path):
        assert target.split(".")[0] not in EXPERIMENT_ONLY, (
          f"{name} imports {target}"
        )


def test_data_is_free_of_jax():
  for path, name in sources():
    if name.startswith(("unisparse_jax.data", "unisparse_jax.tasks")):
      for target in imports_of(path):
        assert target.split(".")[0] not in ("jax", "flax"), f"{name}: {target}"
