"Packaging: names, versions, requirements come from settings.ini; each `NAME_requirements` there is the extra `[NAME]`."
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
sys.path.insert(0, str(here / "tools"))
from readme import with_absolute_links

config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]

extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}
extras["dev"] += extras["lessons"] + extras["lab"]
oldest = cfg["min_python"].removeprefix("3.")
book = cfg["doc_host"] + cfg["doc_baseurl"]

# What the lessons are and show: `wikidpo lessons` writes it out again.
COURSE = (
    "nbs/**/*.ipynb", "nbs/results/**/*.json", "images/*", "benchmarks/**/README.md", "benchmarks/**/results.json",
)


class WithCourse(build_py):
    "The package, and the course as its folder `course`."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in {path for pattern in COURSE for path in here.glob(pattern)}:
            name = path.relative_to(here)
            if not any(part.startswith(".") for part in name.parts):
                to = Path(self.build_lib) / lib / "course" / name
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)


setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=with_absolute_links((here / "README.md").read_text(encoding="utf-8"), cfg),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=book,
    project_urls={
        "Documentation": book,
        "Source": cfg["git_url"],
        "Issues": f"{cfg['git_url']}/issues",
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
    },
    cmdclass={"build_py": WithCourse},
    license_expression=cfg["license"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Operating System :: MacOS",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(int(oldest), 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[lib, lib + ".*"]),
    package_data={lib: ["data/**/*", "profiles/*.yaml", "*/templates/*", "show/static/*", "py.typed"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
