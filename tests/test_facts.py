"The data of MiniWiki: plausible, complete, and free of questions that could mean two facts."
import csv, re, threading, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest, yaml

from wikidpo.world.facts import once

FACTS = Path(__file__).resolve().parent.parent/"wikidpo"/"data"/"facts"
CONTINENTS = {"Africa", "Asia", "Europe", "North America", "South America", "Oceania"}
FAMILIES = {"alkali metals", "alkaline earth metals", "transition metals", "post-transition metals", "metalloids",
            "nonmetals", "halogens", "noble gases", "lanthanides", "actinides"}
KINDS = yaml.safe_load((FACTS/"kinds.yaml").read_text(encoding="utf-8"))
FILES = sorted(p.name for p in FACTS.glob("*.csv"))

def rows(name):
    "The rows of a CSV file as dicts; strict, so that a stray comma or quote is an error"
    with open(FACTS/name, encoding="utf-8", newline="") as f: return list(csv.DictReader(f, strict=True))

def column(name, key): return [r[key] for r in rows(name)]
def pairs(kind): return [(r[kind["subject"]], r[kind["value"]].split("|")) for r in rows(kind["file"])]

def test_enough_facts():
    assert len(KINDS) >= 20
    assert sum(len(pairs(k)) for k in KINDS.values()) >= 1_500
    assert len(rows("countries.csv")) >= 190

def test_no_file_and_no_column_is_left_out():
    told = {(k["file"], k["value"]) for k in KINDS.values()}
    assert len(told) == len(KINDS), "two kinds tell the same column"
    assert told == {(f, c) for f in FILES for c in list(rows(f)[0])[1:]}

@pytest.mark.parametrize("name", FILES)
def test_cells(name):
    rs = rows(name)
    for i, r in enumerate(rs, 2):
        assert None not in r and None not in r.values(), f"{name}:{i}: a row of another length"
        for key, cell in r.items():
            parts = cell.split("|")
            clean = [p and p == p.strip() and "  " not in p and p.isprintable() for p in parts]
            assert all(clean), f"{name}:{i}: {key}: {cell!r}"
            assert len(set(parts)) == len(parts), f"{name}:{i}: {key}: the same value twice"
            assert all(len(p.split()) <= 6 for p in parts[1:]), f"{name}:{i}: too long"
            assert key == list(r)[0] or len(parts[0].split()) <= 4, f"{name}:{i}: too long"
    subjects = [next(iter(r.values())) for r in rs]
    marked = [s for s in subjects if re.search(r"[|.?!:]", s)]
    assert not marked, "a subject is one name without punctuation that ends a sentence"
    assert max(Counter(s.lower() for s in subjects).values()) == 1, "a subject twice"

def test_countries():
    for cell in column("countries.csv", "continent"): assert set(cell.split("|")) <= CONTINENTS
    for cell in column("rivers.csv", "continent"): assert set(cell.split("|")) <= CONTINENTS
    capitals = column("countries.csv", "capital")
    assert len(set(capitals)) == len(capitals)
    assert Counter(c.split("|")[0] for c in column("countries.csv", "currency"))["euro"] >= 20

def test_elements():
    symbols = column("elements.csv", "symbol")
    assert len(symbols) == 118 == len(set(symbols))
    assert all(re.fullmatch("[A-Z][a-z]?", s) for s in symbols)
    assert sorted(map(int, column("elements.csv", "number"))) == list(range(1, 119))
    assert {f for cell in column("elements.csv", "family") for f in cell.split("|")} == FAMILIES

def test_formulas_are_made_of_known_elements():
    symbols = set(column("elements.csv", "symbol"))
    for cell in column("compounds.csv", "formula"):
        for f in cell.split("|"):
            assert re.fullmatch(r"(?:[A-Z][a-z]?\d*|[()]\d*)+", f), f
            assert set(re.findall("[A-Z][a-z]?", f)) <= symbols, f

def test_planets_and_moons():
    assert list(map(int, column("planets.csv", "order"))) == list(range(1, 9))
    assert set(column("moons.csv", "planet")) <= set(column("planets.csv", "planet"))

def test_states():
    assert len(rows("states.csv")) == 50
    for key in ("capital", "abbreviation"): assert len(set(column("states.csv", key))) == 50
    assert all(re.fullmatch("[A-Z]{2}", a) for a in column("states.csv", "abbreviation"))

@pytest.mark.parametrize("name,key,low,high", [
    ("events.csv", "year", 1000, 2025),
    ("scientists.csv", "born", 1400, 2000),
    ("states.csv", "statehood", 1787, 1959),
    ("presidents.csv", "took_office", 1789, 2025)])
def test_years(name, key, low, high):
    for cell in column(name, key):
        assert all(re.fullmatch(r"\d{4}", y) and low <= int(y) <= high for y in cell.split("|")), cell

def test_presidents_in_order():
    years = list(map(int, column("presidents.csv", "took_office")))
    assert years == sorted(years)

@pytest.mark.parametrize("name,key", [("sports.csv", "players"), ("polygons.csv", "sides")])
def test_small_numbers(name, key): assert all(2 <= int(n) <= 20 for n in column(name, key))

def test_a_table_is_made_once_for_all_threads():
    "All of them ask while it is being made"
    made, ready = [], threading.Barrier(8)
    @once
    def table():
        made.append(1)
        time.sleep(.3)
        return {}
    def ask():
        ready.wait()
        return table()
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        found = [f.result() for f in asked]
    assert len(made) == 1 and all(t is found[0] for t in found)


def test_countries_of_mountains_are_countries():
    "The first value is a country of countries.csv, spelt alike"
    assert {c.split("|")[0] for c in column("mountains.csv", "country")} <= set(column("countries.csv", "country"))

@pytest.mark.parametrize("name", KINDS)
def test_kind(name):
    kind, qs = KINDS[name], KINDS[name]["questions"]
    assert set(kind) == {"file", "subject", "value", "statement", "noun", "questions"}
    assert re.fullmatch("[a-z_]+", name)
    assert len(set(qs)) == len(qs) >= 8
    assert all(q.count("{s}") == 1 and "{v}" not in q and q[-1] in ".?" and q == q.strip() for q in qs)
    st = kind["statement"]
    assert st.count("{s}") == 1 == st.count("{v}") and st.endswith(".") and len(st.split()) < 12
    for subject, values in pairs(kind):
        told = st.format(s=subject, v=values[0])
        assert told.count("{") == 0 and told.endswith("."), told
        assert not values[0].endswith("."), "a value that ends in a full stop ends the sentence twice"

def test_every_question_means_one_fact():
    seen = {}
    for name, kind in KINDS.items():
        for subject, _ in pairs(kind):
            for q in kind["questions"]:
                text = q.format(s=subject)
                text = text[0].upper() + text[1:]
                assert "<|" not in text
                assert text.lower() not in seen, f"{text!r}: {seen[text.lower()]} and {(name, subject)}"
                seen[text.lower()] = (name, subject)
    assert len(seen) >= 8*1_500

def test_same_subject_in_two_kinds_is_told_apart():
    "Georgia is a country and a state, Nike a goddess and a company: some word besides the name must differ"
    stems = {}
    for name, kind in KINDS.items():
        for q in kind["questions"]: stems.setdefault(q.lower(), set()).add(name)
    assert not {q: ks for q, ks in stems.items() if len(ks) > 1}
