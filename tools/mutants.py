"Small wrong changes that a test must notice, for mutations.py: each file with its tests, and what is changed in it."
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    file: str  # in wikidpo/
    tests: str  # in tests/: files, or tests of them, that must notice
    old: str  # a text that stands once in the file
    new: str  # what it is changed to


def changes(file: str, tests: str, *pairs: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, tests, old, new) for old, new in pairs]


DATA = [
    *changes(
        "core/files.py", "test_load.py test_pair_data.py",
        ("if len(text) <= most else", "if len(text) <= most + 1 else"),
        ("if c.isprintable() else repr(c)[1:-1]", "if True else repr(c)[1:-1]"),
        ("not row[f].strip(): return", "not row[f]: return"),
        ("if not line.strip(): continue", "if not line.strip(): return"),
        ("enumerate(_lines(path), 1)", "enumerate(_lines(path), 0)"),
        ("begin, here = begin + len(data), begin", "begin, here = begin + len(data) - 1, begin"),
        ("finally:\n        if was_on: gc.enable()", "finally:\n        pass"),
        ("places = sorted((key(row), begin)", "places = list((key(row), begin)"),
        ('("\\\\ud" in text or "\\\\uD" in text)', '"\\\\ud" in text'),
        ('check): raise UserError(f"{name}:{n}: {fault}")\n        yield n, here, row',
         'None): raise UserError(f"{name}:{n}: {fault}")\n        yield n, here, row'),
        ('check): raise UserError(f"{name}:{n}: {fault}")\n        yield n, n, row',
         'None): raise UserError(f"{name}:{n}: {fault}")\n        yield n, n, row'),
    ),
    *changes(
        "core/data.py", "test_pair_data.py",
        ("if ids is None or words != text:", "if ids is None:"),
        ("found.append(ids + [end] * done)", "found.append(ids + [end])"),
        ('[pair.get(f"{side}_finished", True)', '[pair.get(f"{side}_finished", False)'),
        ("[0] * len(prompt) + [1] * len(response)", "[1] * len(prompt) + [1] * len(response)"),
        ("(prompt + response)[:self.block_size]", "(prompt + response)[-self.block_size:]"),
        ("if len(ids) < block_size: return None", "if len(ids) <= block_size: return None"),
        ('if not chosen or not rejected: return "a', 'if False: return "a'),
        ('if chosen == rejected: return "chosen', 'if False: return "chosen'),
        ("if not ids or max(ids) >= symbols: return None", "if not ids: return None"),
        ("return ids[:-1] if ids[-1] == end else ids", "return ids"),
        ("slice(-n, None)", "slice(n, None)"),
        ('part.__dict__.pop("digest", None)', "pass"),
        ("json.dumps([self.block_size, self.rows, self.tok.to_str()])", "json.dumps([self.rows, self.tok.to_str()])"),
        ("json.dumps([self.block_size, self.rows, self.tok.to_str()])", "json.dumps([self.block_size, self.rows])"),
        ('if pair["chosen"] == pair["rejected"]: return', 'if False: return'),
        ("x[torch.arange(x.shape[1]) < lens[:, None]]", "x[x.shape[1] - 1 - torch.arange(x.shape[1]) < lens[:, None]]"),
        ("PairBatch(ids[0::2], mask[0::2], ids[1::2]", "PairBatch(ids[0::2], mask[0::2], ids[0::2]"),
        ("ids[1::2], mask[1::2], pair_ids)", "ids[1::2], mask[1::2])"),
    ),
    *changes(
        "core/chat.py", "test_pair_data.py",
        ("tok.no_padding()", "pass"),
        ("tok.no_truncation()", "pass"),
    ),
    *changes("core/chat.py", "test_foreign.py", ("if system and chat.system:", "if False:")),
    *changes(
        "models/hf.py", "test_foreign.py",
        ("if one in others or place[1] == rest", "if place[1] == rest"),
        ("return place if told == three else None", "return place"),
    ),
    *changes(
        "run/foreign.py", "test_foreign.py",
        ("and 1 <= x <= 10", "and 0 <= x <= 10"),
        ("and not isinstance(x, bool) and", "and"),
        ("if chosen == rejected: raise", "if False: raise"),
        ("if theirs != [*asked, prompt]: raise", "if theirs[1:] != [*asked, prompt][1:]: raise"),
        ('reply[0][0] == "user": asked, reply', 'False: asked, reply'),
        ("[text.strip() for _, text in chat[:n]]", "[text for _, text in chat[:n]]"),
        ("dict.fromkeys(text for text in told + again if text)", "[text for text in told + again if text]"),
        ("self.first.setdefault(why, where)", "self.first[why] = where"),
        ('if chat and chat[-1] == ("assistant", "") else', "if False else"),
        ('or "system_prompt" in row: return False', ": return False"),
        ("(fault if fault == NO_TURNS else no_room)", "no_room"),
        ("if n and not chat_of(tok).system:", "if n:"),
    ),
    *changes(
        "core/pairs.py", "test_pairs.py",
        ('s["score"] is not None and s["text"].strip()', 's["score"] is not None'),
        ('s["score"] is not None and s["text"].strip()', 's["text"].strip()'),
        ('scored.sort(key=itemgetter("k"))', "pass"),
        ("start = prompt_id % max(len(scored), 1)", "start = 0"),
        ('< gap or hi["text"] == lo["text"]', '< gap'),
        ('hi["score"] - lo["score"] < gap', 'hi["score"] - lo["score"] <= gap'),
        ('elif hi["score"] < best', 'elif hi["score"] <= best'),
        ("in (max, min)", "in (min, max)"),
        ('"rejected_tokens": rejected["ids"]', '"rejected_tokens": chosen["ids"]'),
        ('"temp_rejected": rejected["temperature"]', '"temp_rejected": chosen["temperature"]'),
        ('"rejected_finished": rejected["finished"]', '"rejected_finished": True'),
        ("if len(group) < 2:", "if len(group) < 1:"),
    ),
    *changes(
        "run/folder.py", "test_writing.py",
        ("_write_file(tmp, data)\n            os.replace(tmp, path)", "_write_file(path, data)"),
        ("finally: tmp.unlink(missing_ok=True)", "finally: pass"),
        ("while rest: rest = rest[os.write(fd, rest):]", "os.write(fd, rest)"),
        ("if end < os.fstat(self.fd).st_size: os.ftruncate(self.fd, end)", "pass"),
        ("return start + newline + 1", "return start + newline"),
        ("json.dumps(r, ensure_ascii=False)", "json.dumps(r)"),
        ("data = _object_in(path) | sections", "data = sections"),
    ),
    *changes(
        "run/mine.py", "test_mining.py::test_files_are_complete_and_agree",
        ("rows = [row for i, group in enumerate(next(groups), unit * UNIT)",
         "rows = [row for i, group in enumerate(next(groups), 0)"),
    ),
    *changes(
        "run/mine.py", "test_mining.py::test_a_unit_cut_in_the_middle_is_sampled_again",
        ("if len(places) == size(unit)}", "}"),
        ('yield [row for row in rows if (row["prompt_id"], row["k"]) not in scored]', "yield rows"),
        ("if places == sorted(places) and len(places) == sum(1 for _ in f): return False",
         "if places == sorted(places): return False"),
        ('places = sorted((s["prompt_id"], s["k"], begin)', 'places = list((s["prompt_id"], s["k"], begin)'),
    ),
    *changes(
        "run/mine.py", "test_mining.py::test_a_mining_that_only_has_to_be_judged_opens_no_policy",
        ("if not todo: return iter(())", "pass"),
        ("scores_in[unit] == len(units[unit])", "scores_in[unit] > 0"),
    ),
    *changes(
        "run/mine.py",
        "test_mining.py::test_the_filters_are_those_of_the_configuration_and_what_has_no_score_is_counted"
        " test_mining.py::test_a_prompt_that_leaves_no_room_is_refused_before_the_first_is_asked"
        " test_mining.py::test_prompts_the_teacher_cannot_place_give_no_pairs",
        ("found, counted = make_pairs(rows, gap, best)", "found, counted = make_pairs(rows)"),
        ("counts.update(counted)", "pass"),
        ('"unparsable": len(missing)', '"unparsable": 0'),
        ("if not pairs and not shard: _complain", "if False: _complain"),
        ("if len(ids) <= room: continue", "if True: continue"),
    ),
    *changes(
        "show/curves.py", "test_runs.py::test_a_trailing_mean_is_that_of_its_window_whatever_stood_before",
        ("else left[i + 1 - w] + s", "else s"),
        ("s / n if n else math.nan", "s / n if n else 0."),
    ),
    *changes(
        "engine/memory.py", "test_engine.py::test_memory_that_has_grown_by_a_quarter_is_given_back",
        ("if self.steps == 2: self.most = 1.25", "if self.steps == 1: self.most = 1.25"),
        ("if held <= self.most: return", "if held < self.most: return"),
        ("if self.gave_back == self.steps - 1: self.most *= 1.25", "pass"),
    ),
    *changes(
        "engine/accelerate.py", "test_engine.py::test_a_short_run_on_a_gpu_is_not_compiled",
        ("(on_cpu or tokens >= WORTH_COMPILING)", "(on_cpu or tokens > WORTH_COMPILING)"),
        ("(on_cpu or tokens >= WORTH_COMPILING)", "(tokens >= WORTH_COMPILING)"),
    ),
    *changes(
        "engine/training.py", "test_engine.py::test_an_engine_is_told_how_many_tokens_it_reads",
        ("for ids in dataset.rows[i])", "for ids in dataset.rows[i][:2])"),
    ),
    *changes(
        "run/folder.py", "test_folder.py::test_what_pytorch_writes_meets_a_full_disk_as_everything_does",
        ("if isinstance(e.__context__, OSError): raise e.__context__ from None", "pass"),
    ),
    *changes(
        "run/winrate.py", "test_cli.py::test_a_comparison_calls_the_models_that_it_was_given_by_their_files",
        ('return "DPO" if own else', 'return "DPO" if True else'),
    ),
    *changes(
        "run/mine.py", "test_mining.py::test_how_many_prompts_stand_in_the_batch_may_be_left_to_the_machine",
        ("batch = prompts_at_once(cfg.batch, device_of(model))", "batch = UNIT"),
    ),
    *changes(
        "run/mine.py", "test_mining.py::test_another_seed_is_another_run",
        ("cfg.seed, batch, **options", "0, batch, **options"),
    ),
    *changes(
        "show/vote.py", "test_widgets.py::test_votes"
        " test_load.py::test_a_vote_does_not_look_at_all_questions_again",
        ('key=lambda i: _stable_random(seed, "order", i)', "key=lambda i: 0"),
        ("if i not in self.votes), None)", "), None)"),
        ('number not in (None, len(self.votes)): return', "False: return"),
    ),
    *changes(
        "show/inspector.py", "test_load.py test_widgets.py::test_inspector_reads_pairs_and_samples_alike",
        ("return pairs, prompts", "return pairs, len(pairs)"),
        ("make_pairs(list(rows), 0, 0)[0]", "make_pairs(list(rows))[0]"),
        ("read_in_order(source, by_prompt, check)", "(row for *_, row in each_line(source, check=check))"),
    ),
    *changes(
        "show/report.py", "test_load.py test_report.py::test_hostile_text_stays_text",
        ("unread, counts = seen.pop(None, 0), Counter()", "unread, counts = seen.pop(None, 0) and 0, Counter()"),
        ("counts[round(score)] += n", "counts[round(score)] += 1"),
        ("\\U000e0000-\\U000e0fff]", "]"),
    ),
]

STATISTICS = [
    *changes(
        "core/stats.py", "test_stats.py",
        ("if n == 0: return 0., 1.", "if n == 0: return .5, .5"),
        ("half = math.sqrt(p*(1 - p)*c + c*c/4)", "half = math.sqrt(p*(1 - p)*c)"),
        ("z:float=1.96", "z:float=1.64"),
        ("alpha/2)/(2*math.sqrt(m))", "alpha)/(2*math.sqrt(m))"),
        ("+ normal.cdf((.5 - p - edge)/sd)", ""),
        ("if 2*.5**m > alpha or power(high, m, alpha) < chance: return 1.", "if m <= 0: return 1."),
        ("comparisons\n               chance:float=.8", "comparisons\n               chance:float=.9"),
        ("[(num[i].sum(), den[i].sum()) for i in draws]", "[(num[i].sum(), den.sum()) for i in draws]"),
        ("rng.integers(len(num), size=len(num))", "rng.integers(len(num), size=len(num)//2)"),
        ("level:float=.95", "level:float=.90"),
        ("ok = bottoms != 0", "ok = bottoms == bottoms"),
        ("seed:int=0, # of the draws", "seed:int|None=None, # of the draws"),
        ("if first is None or second is None: return None", ""),
        ('("B", "A"): "b"', '("B", "A"): "a"'),
    ),
    *changes(
        "run/evaluate.py", "test_evaluate.py::test_summarize_counts_and_leaves_out_what_could_not_be_read"
        " test_evaluate.py::test_the_truth_is_reported_beside_the_judge"
        " test_evaluate.py::test_a_tie_with_the_truth_is_no_agreement"
        " test_evaluate.py::test_what_is_detectable_and_how_the_lengths_differ_depend_on_the_decided",
        ('(row["truth_a"] > row["truth_b"]) - (row["truth_a"] < row["truth_b"])',
         '(row["truth_a"] > row["truth_b"]) - (row["truth_a"] <= row["truth_b"])'),
        ('if s and r["result"] != "tie"]', "if s]"),
        ('read = [r for r in rows if r["result"] is not None]', "read = list(rows)"),
        ('bootstrap([len(r["a"]) - len(r["b"])', 'bootstrap([len(r["b"]) - len(r["a"])'),
    ),
    *changes(
        "core/stats.py", "test_winrate.py",
        ('win, tie, loss = (results.count(r) for r in ("a", "tie", "b"))',
         'loss, tie, win = (results.count(r) for r in ("a", "tie", "b"))'),
        ('tie_said = read.count(("TIE", "TIE"))', "tie_said = tie"),
        ("tail += ways # in which", "tail = ways # in which"),
        ("return min(1., 2*tail/2**m)", "return min(1., tail/2**m)"),
        ("alike = len(set(scores)) == 1", "alike = False"),
    ),
    *changes(
        "run/winrate.py", "test_winrate.py"
        " test_evaluate.py::test_summarize_counts_and_leaves_out_what_could_not_be_read"
        " test_evaluate.py::test_what_is_detectable_and_how_the_lengths_differ_depend_on_the_decided",
        ("low, high = wilson(win, win + loss)", "low, high = wilson(win, win + tie + loss)"),
        ("mde = tie/(win + tie + loss), detectable(win + loss)",
         "mde = tie/(win + tie + loss), detectable(win + tie + loss)"),
        ('"decided_win_rate": win/(win + loss)', '"decided_win_rate": win/(win + tie + loss)'),
        ("np.repeat([1., -1.], len(first))", "np.repeat([1., 1.], len(first))"),
        ("[1 - points[v] for v in second]", "[points[v] for v in second]"),
        ("np.tile(times, (2, 1))", "np.repeat(times, 2, 0)"),
        ("if not min(longer) <= 0 <= max(longer): return None, 0., 1.", "if False: return None, 0., 1."),
        ("ALARM = .05", "ALARM = .1"),
        ("np.abs(sums) >= abs(steps.sum())", "np.abs(sums) > abs(steps.sum())"),
    ),
    *changes(
        "run/controls.py", "test_winrate.py"
        " test_evaluate.py::test_the_controls_stand_against_the_same_answers_of_the_baseline",
        ("read(name, 0))[0])", "read(name, 1))[0])"),
        ("challenger[1::2], results[best][1::2]", "challenger[::2], results[best][::2]"),
        ("if read(name, 0) and read(name, 1)]", "if read(name, 0)]"),
        ('{None: "", verdict: ", as it should be"}', '{None: "", verdict: ""}'),
        ("if t != cfg.temperature: found", "found"),
        ("(stream + 1)*FAR", "0*FAR"),
    ),
    *changes(
        "run/compare.py", "test_compare.py",
        ("seen[key] += 1", "pass"),
        ("return files, common[:n]", "return files, common"),
        ('if row["a"] <= row["b"]: return found', "if True: return found"),
        ('if row["a"] == row["b"]: f.write(row | SAME)', 'if False: f.write(row | SAME)'),
        ('if row["prompt_id"] in done: continue', "if False: continue"),
        ('[row for row in read_records(path, Verdict) if row["result"]]', "read_records(path, Verdict)"),
        ('elif (question := _question(row)) in known:', 'elif (question := _question(row)) in ():'),
        ('points[i, b, a] += 1 - POINTS', 'points[i, b, a] += POINTS'),
        ("size=n), minlength=n)", "size=9*n), minlength=n)"),
        ('"unmatched": len(f.found) - n', '"unmatched": len(f.found)'),
        ("np.argsort(-s, kind", "np.argsort(s, kind"),
    ),
    *changes(
        "judge/quality.py", "test_judge_quality.py",
        ('strict=True) if row["result"]]', "strict=True)]"),
        ('if true == "tie" and row["a"] != row["b"]]', 'if true == "tie"]'),
        ('!= "tie" and len(row["a"]) != len(row["b"])]', '!= "tie"]'),
        ('if v != "TIE"]', "]"),
        ("/(both/true - false_alarm)", "/(both/true)"),
        ("np.asarray(table, float) + 1/3", "np.asarray(table, float)"),
        ("np.asarray(judged, float) + 1/3", "np.asarray(judged, float)"),
        ("rate(joint, rng.dirichlet(counts, draws))", "rate(joint, counts/counts.sum())"),
        ("rng.dirichlet(votes.ravel(), draws)", "np.tile(votes.ravel()/votes.sum(), (draws, 1))"),
        ("read = [(one, two) for one, two in verdicts if one and two]", "read = verdicts"),
    ),
    *changes(
        "run/evaluate.py", "test_evaluate.py::test_the_temperature_is_that_of_the_configuration"
        " test_evaluate.py::test_a_model_against_itself_has_two_random_streams"
        " test_evaluate.py::test_an_oracle_judge_is_obeyed"
        " test_evaluate.py::test_a_restart_repeats_nothing_and_changes_nothing"
        " test_evaluate.py::test_what_is_judged_is_never_judged_again",
        ("2*cfg.seed + i, unit)", "2*cfg.seed, unit)"),
        ("2*cfg.seed + i, unit)", "cfg.seed + i, unit)"),
        ("cfg.temperature, cfg.max_new, cfg.top_k\n", ".7, cfg.max_new, cfg.top_k\n"),
        ('if r["prompt_id"] not in done])', "])"),
        ('sorted(read_records(path, Verdict), key=lambda r: r["prompt_id"])', "read_records(path, Verdict)"),
    ),
    *changes(
        "judge/ask.py", "test_evaluate.py::test_an_oracle_judge_is_obeyed",
        ("ask_verdict(client, judge_model, prompt, b, a, probe)",
         "ask_verdict(client, judge_model, prompt, a, b, probe)"),
    ),
    *changes(
        "run/sweep.py", "test_sweep.py::test_a_prediction_is_right_wrong_or_open"
        " test_sweep.py::test_a_prediction_answers_all_questions_and_comes_first"
        " test_sweep.py::test_the_gap_of_two_win_rates_counts_decided_questions"
        " test_sweep.py::test_the_gap_of_two_distances_is_paired",
        ("decided = (drawn != 0).sum(1)", "decided = (drawn == drawn).sum(1)"),
        ("[.025, .975])", "[.05, .95])"),
        ("bootstrap(np.asarray(a) - np.asarray(b))", "bootstrap(np.asarray(a) + np.asarray(b))"),
        ('near = min(rows, key=lambda r: r["kl"])', 'near = max(rows, key=lambda r: r["kl"])'),
        ('top = max(rows, key=lambda r: r["margin"])', 'top = min(rows, key=lambda r: r["margin"])'),
        ("if predicted == found and not rivals", "if predicted == found"),
        ("if set(answers) != set(QUESTIONS):", "if False:"),
    ),
    *changes(
        "run/sweep.py", "test_sweep.py::test_a_run_for_each_beta_alike_in_all_else"
        " test_sweep.py::test_the_distance_is_the_mean_of_the_log_ratios_and_its_error"
        " test_sweep.py::test_a_sweep_that_is_done_is_kept",
        ('_POINTS = {"a": 1, "b": -1}', '_POINTS = {"a": 1, "b": 1}'),
        ("(d.std() / len(d) ** .5).item()}", "d.std().item()}"),
        ('if (out/"sweep.json").exists(): raise', "if False: raise"),
        ("[:cfg.n_pairs])", ")"),
        ("beta=beta, pairs=str(pairs)", "pairs=str(pairs)"),
    ),
    *changes(
        "judge/prompts.py", "test_judge_prompts.py",
        ("_SCORE.fullmatch(", "_SCORE.match("),
        ("_VERDICT.fullmatch(", "_VERDICT.search("),
        ('r"(10|[1-9])', 'r"([1-9]|10|0)'),
        ("(?: ?/ ?10| out of 10)?", "(?: ?/ ?10+| out of 10)?"),
        ('">]", 64)[:limit]', '">]", 64)'),
        ("max(3, 1 + max(map(len", "max(3, max(map(len"),
        ('strip_tokens(text, _CONTROL, ">]", 64)', '_CONTROL.sub("", text)'),
        ('return m[1].upper() if m else None', "return m[1] if m else None"),
    ),
    *changes(
        "judge/pool.py", "test_judge_pool.py::test_pool_submit_tells_the_sampler test_judge_pool.py",
        ("if tries == 3 and not self.give_up: raise e", "pass"),
        ("if self.lost >= self.max_lost:", "if False:"),
        ("if tries < 3: return self.todo.put((item, tries + 1))", "pass"),
        ("if self.closed: return", ""),
        ("else: self.lost = 0", "else: pass"),
        ("if self.failed: raise self.failed\n                self.left", "self.left"),
        ("lambda: self.failed or self.left < self.room", "lambda: True"),
    ),
]

TRAINING = [
    *changes(
        "core/loss.py", "test_loss.py",
        ("return beta * (pi - ref)", "return pi - ref"),
        ("(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
         "(policy_chosen - ref_chosen) + (policy_rejected - ref_rejected)"),
        ("return -F.logsigmoid(beta * z)", "return -F.logsigmoid(z)"),
        ("return -F.logsigmoid(beta * z)", "return -torch.log(torch.sigmoid(beta * z))"),
        ("return torch.sigmoid(-beta * z)", "return torch.sigmoid(beta * z)"),
        ("1 / (2 * beta)", "1 / beta"),
        ("F.relu(1 - beta * z)", "1 - beta * z"),
        ("(1 - label_smoothing) * dpo_loss(z, beta)", "dpo_loss(z, beta)"),
        ("if not 0 < beta < math.inf:", "if not 0 <= beta < math.inf:"),
        ("check_loss_options(beta, loss_type, label_smoothing)\n", "pass\n"),
    ),
    *changes(
        "core/loss.py", "test_family.py::test_known_values"
        " test_family.py::test_every_option_changes_the_loss_or_is_refused",
        (" - gamma / beta", ""),
        ("chosen / self.chosen_tokens, rejected / self", "chosen / self.rejected_tokens, rejected / self"),
        ("torch.sigmoid(beta * rejected)", "torch.sigmoid(-beta * rejected)"),
        ("torch.sigmoid(beta * chosen) + ", ""),
        ("logp - torch.log(-torch.expm1(logp))", "logp"),
        ("return loss + sft_weight * sft_loss(p) if sft_weight else loss", "return loss"),
    ),
    *changes(
        "core/logps.py", "test_training.py::test_seq_logprob_is_the_definition_for_any_ragged_batch"
        " test_training.py::test_bf16_logits_are_summed_in_float32"
        " test_training.py::test_changing_rejected_leaves_chosen_alone",
        ("* mask[:, 1:]).sum(-1)", "* mask[:, :-1]).sum(-1)"),
        ("* mask[:, 1:]).sum(-1)", ").sum(-1)"),
        ("* mask[:, 1:]).sum(-1)", "* mask[:, 1:]).sum(-1) / mask.sum(-1)"),
        ("[:, :-1].float().log_softmax(-1)", "[:, :-1].log_softmax(-1)"),
        ("gather(-1, ids[:, 1:, None])", "gather(-1, ids[:, :-1, None])"),
    ),
    *changes(
        "core/train.py", "test_training.py::test_schedule_warms_up_and_ends_at_zero"
        " test_training.py::test_every_step_has_its_learning_rate_and_no_dropout"
        " test_training.py::test_a_step_of_the_plain_engine_is_adamw_with_a_clipped_gradient"
        " test_training.py::test_a_forward_holds_the_batch_size_and_pairs_of_like_length"
        " test_training.py::test_a_run_that_explodes_says_so"
        " test_training.py::test_reference_does_not_move_and_policy_does"
        " test_training.py::test_every_pair_is_seen_once_an_epoch_also_in_the_last_partial_window"
        " test_training.py::test_order_depends_on_the_seed_and_on_nothing_else"
        " test_training.py::test_accumulation_gives_the_gradient_of_one_batch_also_when_ragged",
        ("return copy.deepcopy(model).eval()", "return model.eval()"),
        ("return (step + 1) / (warmup_steps + 1)", "return step / (warmup_steps + 1)"),
        (".5 * (1 + math.cos(math.pi * done))", "(1 - done)**.1"),
        ("betas=(.9, .95)", "betas=(.9, .999)"),
        ("weight_decay=0.", "weight_decay=.1"),
        ("torch.Generator().manual_seed(cfg.seed)", "torch.Generator().manual_seed(0)"),
        ("generator=own_stream)", "generator=None)"),
        ("shuffle=True", "shuffle=False"),
        ("for _ in range(cfg.epochs)", "for _ in range(1)"),
        ("right = (chosen > rejected).float()", "right = (chosen >= rejected).float()"),
        ("share = batch.weight / len(pair_ids)", "share = batch.weight / len(batch)"),
        ("engine.backward(losses.sum() * share)", "engine.backward(losses.mean())"),
        ("    policy.eval()\n", "    policy.train()\n"),
        ("opt.zero_grad()", "pass"),
        ("clip_grad_norm_(self.policy.parameters(), self.cfg.max_grad_norm)",
         "clip_grad_norm_(self.policy.parameters(), math.inf)"),
        ("check_finite(history[-1], cfg)", "pass"),
        ("set_lr(opt, lr)\n", "pass\n"),
        ("[by_length[i:i + batch_size]", "[by_length[i:i + batch_size - 1] or by_length[i:i + 1]"),
    ),
    *changes(
        "engine/reference_cache.py", "test_writing.py",
        ('h.update(f"{name} {w.dtype} {tuple(w.shape)}".encode())', "pass"),
        ("h.update(w.view(-1).view(torch.uint8).numpy())", "pass"),
        ("table[[i for pair_ids in groups for i in pair_ids]] = torch.cat(found).cpu()",
         "table[:sum(map(len, groups))] = torch.cat(found).cpu()"),
        ("torch.stack([chosen, rejected], 1)", "torch.stack([rejected, chosen], 1)"),
        ("hashlib.sha256(json.dumps(key).encode())", "hashlib.sha256(json.dumps(key[:1]).encode())"),
        ("if folder and rank() == 0:", "if False:"),
        ("h.update(hashlib.sha256(path.read_bytes()).digest())", "h.update(path.name.encode())"),
        ("theirs = [_file_of(type(part).forward) for part in model.modules()]", "theirs = []"),
    ),
    *changes(
        "engine/distributed.py", "test_writing.py",
        ('state = torch.load(path, map_location="cpu", weights_only=True)',
         'state = torch.load(path, map_location="cpu", weights_only=False)'),
        ("optim_state_dict=state.pop(\"optimizer\")", "optim_state_dict=(state.pop(\"optimizer\"), {})[1]"),
    ),
    *changes(
        "models/checkpoints.py", "test_writing.py::test_a_checkpoint_comes_back_as_it_was_in_both_formats"
        " test_writing.py::test_weights_that_do_not_fit_and_configs_of_others_are_refused"
        " test_writing.py::test_a_state_a_checkpoint_and_a_cache_run_nobody_s_code"
        " test_checkpoint_faults.py::test_changed_bytes_are_noticed",
        ('map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)'),
        ("return model.to(device).eval()", "return model.to(device)"),
        ("if digest is not None and digest != _digest(state, config):", "if False:"),
        ("load_state_dict(state, assign=not fits)", "load_state_dict(state, assign=not fits, strict=False)"),
        ("== weight_count(cfg)", "> 0"),
        (".to(dtype or v.dtype)", ".to(v.dtype)"),
        ("if unknown := sorted(set(config) - set(known)):", "if False:"),
    ),
    *changes(
        "run/train.py", "test_training.py::test_a_summary_is_the_mean_of_the_end"
        " test_training.py::test_nothing_is_held_out_where_nobody_can_measure_it"
        " test_training.py::test_a_watcher_that_goes_on_writes_no_step_twice"
        " test_training.py::test_the_watched_pairs_are_computed_twice"
        " test_training.py::test_held_out_pairs_are_measured_and_not_trained_on"
        " test_training.py::test_what_is_held_out_is_measured_at_every_twelfth_of_a_run_and_at_its_end",
        ("or step == self.steps", ""),
        ("-(-steps // 12)", "max(1, steps // 12)"),
        ("return self.pair_logps().margin()", "return -self.pair_logps().margin()"),
        ('metrics["valid/accuracy"] = (z > 0)', 'metrics["valid/accuracy"] = (z >= 0)'),
        ("cfg.beta * z.mean().item()", "z.mean().item()"),
        ("if step not in self.known and self.watched.is_due(step)", "if self.watched.is_due(step)"),
        ("if 0 not in self.known: self.write", "if True: self.write"),
        ("tail = history[-max(1, len(history) // 10):]", "tail = history"),
        ("n = 0 if cfg.shard else int(cfg.valid * len(dataset))", "n = int(cfg.valid * len(dataset))"),
        ("for t in range(len(prompt), len(ids))", "for t in range(len(prompt) + 1, len(ids))"),
        ('"loss_first": history[0]["loss"]', '"loss_first": history[-1]["loss"]'),
    ),
    *changes(
        "show/doctor.py", "test_runs.py::test_the_doctor_says_when_it_is_too_early_or_nothing_is_there"
        " test_runs.py::test_the_doctor_finds_health test_runs.py::test_the_doctor_names_the_illness",
        ("max(1, len(metrics[\"loss\"])//5))", "len(metrics[\"loss\"]))"),
        ("if steps < max(5, warm_up + 1):", "if steps < 5:"),
        ("math.isfinite(x) for x in values", "True for x in values"),
        ("if s.holds is False), \"\")", "if not s.holds), \"\")"),
    ),
    *changes(
        "show/signs.py", "test_runs.py::test_a_wild_loss_does_not_glide"
        " test_runs.py::test_a_margin_that_comes_up_from_below_0_and_stays_there_does_not_grow"
        " test_runs.py::test_the_doctor_names_the_illness"
        " test_runs.py::test_the_doctor_says_when_it_is_too_early_or_nothing_is_there",
        ("all(abs(m) <= of_margin for m in margins)", "True"),
        ("< of_loss * max(1, e.equal_loss)", "< 100 * of_loss * max(1, e.equal_loss)"),
        ("MEAN_NOT_SUM if is_mean else OTHER_TOKENS", "OTHER_TOKENS"),
        ("not stuck and agrees", "not stuck"),
        ("chosen / e.beta <= -20", "False"),
        ("end < 1.6 * begin", "end < 16 * begin"),
        ("not flat and not wild and (loss", "not flat and (loss"),
        ("last > max(first, 0)", "last > first"),
        (".6 < accuracy < .99", ".6 < accuracy"),
    ),
]

RUNS = [
    *changes("engine/training.py", "test_ranks.py::test_shards_with_unequally_many_forwards_end",
             ("float(k < own)", "1.")),
    *changes("engine/training.py", "test_engine.py",
             ("key = [model_digest(ref), code_digest(ref)", 'key = ["", code_digest(ref)'),
             ("parts.attention.__qualname__, parts.chunk", "0, parts.chunk"),
             ("parts.attention.__qualname__, parts.chunk", "parts.attention.__qualname__, 0")),
    *changes("engine/reference_cache.py", "test_engine.py",
             ("config = repr(model.cfg) if isinstance(model, GPT)", 'config = "" if isinstance(model, GPT)')),
    *changes("engine/ragged.py", "test_sampling.py", ("crowded = 1.", "crowded = .75"),
             ("together = 32", "together = 64"),
             ("if len(tensors) == 1: return tensors[0]", "return tensors[0]"),
             ("self.row_of.view(-1)[self.slot] = torch.arange(len(self.slot), device=self.slot.device)", "pass"),
             ("self.row_of.view(-1)[self.slot] = torch.arange(len(self.slot), device=self.slot.device)",
              "self.row_of.view(-1)[:len(self.slot)] = torch.arange(len(self.slot), device=self.slot.device)")),
    *changes("core/kto.py", "test_family.py",
             ("if prompts[j] != prompt", "if True"),
             ("part.desirable = self.desirable[which]", "pass"),
             ("(super().digest + labels)", "(super().digest)")),
    *changes("run/profiles.py", "test_config.py",
             ('"teacher.retries", "teacher.concurrency"}', '"teacher.retries"}'),
             ('if k.split(".")[-1] in same: continue', "pass"),
             ('"offline" not in (old.get(name), new.get(name))', "True"),
             ('"" if restart is None else', "")),
    *changes("run/mine.py", "test_mining.py::test_a_merge_of_shards_that_have_changed_is_not_kept_for_the_new_one",
             ("_refuse_other_merge(out, files)\n            return", "return")),
    *changes("run/publish.py", "test_secrets.py::test_a_secret_in_a_pair_is_found_wherever_it_stands",
             ("ensure_ascii=False), *_texts_in(pair)])", "ensure_ascii=False)])")),
    *changes("run/train.py", "test_training.py::test_what_wandb_mode_says_counts_where_nobody_asks_for_more",
             ('os.environ.get("WANDB_MODE") or', "")),
    *changes("show/tokens.py", "test_widgets.py", ('text.rstrip("\\ufffd")', "text")),
    *changes("show/vote.py", "test_widgets.py", ('(None, _digest(rows[v["prompt_id"]]))', '(None, v.get("answers"))')),
    *changes("run/prompts.py", "test_prompts.py",
             ('if kind != "texts": _refuse_others(out, files)', "pass"),
             ("if is_dialogue(value) else value", "if False else value")),
    *changes("show/signs.py", "test_doctor.py",
             ('e.config.get("loss_type") == "robust"', "False"),
             ("max(e.z or 0, e.z_watched or 0)", "max(e.z, e.z_watched or 0)")),
    *changes("cli.py", "test_hf.py::test_a_run_is_exported_by_what_it_has_trained", ("and not named else", "else")),
]

MUTANTS = [*DATA, *STATISTICS, *TRAINING, *RUNS]

KNOWN: dict[tuple[str, str, str], str] = {} # (file, old, new) of a change that may survive: the reason
