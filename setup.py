"""Where the two packages lie: `quietstar/` at the top, `quietstar_kernels` below `kernels/`.

The rest of the build is in pyproject.toml. `kernels/` is a source root and not a package, because a top-level package
called `kernels` would hide the one that transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["quietstar", "quietstar.*"]), *find_packages("kernels")],
    package_dir={"quietstar_kernels": "kernels/quietstar_kernels"},
    package_data={
        "quietstar": ["py.typed"],
        "quietstar.reporting": ["viewer.*"],
        "quietstar.tasks": ["few_shot/*"],
        "quietstar_kernels": ["py.typed", "configurations.json"],
    },
)
