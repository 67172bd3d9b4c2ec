"""Breaks the core on purpose, one small edit at a time, and demands that the suite notices.

    python tests/mutants.py [WORD]      all mutants, or those whose description contains WORD

Each mutant is a bug that a port of DeepSeek-R1 could have; many have been seen in one. A copy of the project
gets the edit and runs the tests named with it. If these still pass, the suite does not prove what it says.
"""
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")       # torch and transformers are imported once for all
FORKS.set_forkserver_preload(["torch", "transformers.models.deepseek_v3.modeling_deepseek_v3",
                              "transformers.models.llama.modeling_llama",
                              "transformers.models.qwen2.modeling_qwen2"])

MUTANTS = [     # description, file, original, replacement, file of tests (or test) that must fail
    ("softmax scale without YaRN's mscale^2", "model.py",
     "** -0.5 * mscale ** 2", "** -0.5", "test_rope"),
    ("YaRN's ramp ends one pair early", "model.py",
     "min(math.ceil(", "min(math.floor(", "test_rope"),
    ("llama3 scaling forgets to slow long waves", "model.py",
     "* freqs / rope.factor + keep", "* freqs + keep", "test_rope"),
    ("RoPE pairs halves instead of neighbours", "model.py",
     "x.float().unflatten(-1, (-1, 2))", "x.float().unflatten(-1, (2, -1)).mT.contiguous()",
     "test_model_vs_hf"),
    ("RoPE, compiled, pairs halves instead of neighbours", "model.py",
     "unflatten(-1, (-1, 2)).flip(-1)", "unflatten(-1, (2, -1)).flip(-2)", "test_rope"),
    ("the latent is not normed", "model.py",
     "c_kv = self.kv_norm(c_kv)", "c_kv = c_kv", "test_model_vs_hf"),
    ("the rotary part of the query is taken from the front", "model.py",
     "q_nope, q_pe = q.split([self.d, self.r], dim=-1)", "q_pe, q_nope = q.split([self.r, self.d], dim=-1)",
     "test_model_vs_hf"),
    ("flash decoding does not fade what it summed under a smaller maximum", "attention.py",
     "acc = acc * fade[:, None] + tl.dot", "acc = acc + tl.dot",
     "interpreted::test_one_query_a_row_attends_to_what_its_row_holds"),
    ("flash decoding stops before the newest key", "attention.py",
     "tl.load(positions + row).to(tl.int32) + 1)", "tl.load(positions + row).to(tl.int32))",
     "interpreted::test_one_query_a_row_attends_to_what_its_row_holds"),
    ("runs of keys count alike, however much weight they have", "attention.py",
     "lse.softmax(-1)[..., None] * parts", "lse.isfinite()[..., None] * parts",
     "interpreted::test_one_query_a_row_attends_to_what_its_row_holds"),
    ("hidden keys count, a run of them", "attention.py",
     "lse = lse + mask[..., 0] ", "",
     "test_attention::test_attention_in_runs_is_its_formula[1-5-1-128-96-6]"),
    ("a short cache needs compiled layers of its own", "decode.py",
     "return max(-(-rt.max_seq_len // 64) * 64, LEAST) if rt.compile else rt.max_seq_len",
     "return rt.max_seq_len",
     "test_decode::test_a_short_cache_needs_nothing_compiled_of_its_own[dense-1]"),
    ("a GPU's compiled layers get parts of the cache", "decode.py",
     "cache = self.cache.view(slice(0, rows), self.slots)",
     "cache = self.cache.view(slice(0, rows), slots)",
     "test_decode::test_steps_on_static_buffers_equal_dynamic_ones[dense-1]"),
    ("AVX-512 alone is taken for products of bf16", "products.py",
     "or torch.cpu._is_avx512_bf16_supported())", "or True)",
     "test_rounding::test_bf16_is_multiplied_as_such_where_the_cpu_can"),
    ("a compiled step leaves its slot to the next one", "compiled.py",
     "cache.lengths += 1", "cache.lengths += 0",
     "test_decode::test_a_step_in_parts_is_the_whole_step[dense-1]"),
    ("absorbed attention puts the key projection on its output", "model.py",
     "per_head(o_c, w_v.mT)", "per_head(o_c, w_k.mT)", "test_attention"),
    ("latents are absorbed for 170 queries, however few the slots", "model.py",
     "s == 1 or absorbed <= expanded", "s <= 170",
     "test_attention::test_r1_evaluates_latent_attention_in_the_cheaper_order"),
    ("a query sees the token after it", "model.py",
     "device=device) <= positions", "device=device) <= 1 + positions", "test_model_vs_hf"),
    ("a cloned row forgets its length", "model.py",
     "        self.lengths[target] = length\n", "",
     "test_attention::test_a_copied_row_goes_on_like_its_source_and_leaves_it_alone"),
    ("the bias leaks into the experts' weights", "model.py",
     "weights = scores.gather(1, experts)", "weights = (scores + self.bias).gather(1, experts)", "test_moe"),
    ("dropped groups are masked with 0", "model.py",
     "dropped[..., None], -math.inf)", "dropped[..., None], 0.0)", "test_moe"),
    ("a group is judged by its best expert alone", "model.py",
     "biased.topk(2, dim=-1)", "biased.topk(1, dim=-1)", "test_moe"),
    ("route_scale forgotten", "model.py",
     "return weights * moe.route_scale", "return weights", "test_moe"),
    ("the shared expert counts twice", "model.py",
     "y = self.shared(tokens).float()", "y = 2 * self.shared(tokens).float()", "test_moe"),
    ("ranks do not add up the feed-forward", "model.py",
     "all_reduce(self.ffn(self.ffn_norm(x)), self.tp)", "self.ffn(self.ffn_norm(x))",
     "test_cli::test_two_ranks_and_converted_folders_write_the_same_bytes[dense]"),
    ("an edge block of FP8 is forgotten", "kernel.py",
     "return -(-size // BLOCK)", "return size // BLOCK", "test_fp8"),
    ("one activation scale for all channels", "kernel.py",
     "a_scale[..., i, None]", "a_scale[..., 0, None]", "test_fp8"),
    ("an all-zero block divides by zero", "kernel.py",
     ".clamp(min=1e-12)", "", "test_fp8"),
    ("an edge block is read beyond its channels", "kernel.py",
     "a_mask & inside, w_mask & inside", "a_mask, w_mask",
     "interpreted::test_gemm_equals_float64_and_the_definition"),
    ("the number of splits depends on the number of tokens", "kernel.py",
     "n_splits(tiles, n_blocks(k)", "n_splits(tiles * len(a), n_blocks(k)",
     "interpreted::test_a_row_does_not_depend_on_how_many_others_there_are"),
    ("experts' tiles start at their neighbours' slots", "kernel.py",
     "first = stop[e] - count[e] +", "first = stop[e] +", "test_fp8"),
    ("slots are joined with other tokens' weights", "model.py",
     "out.unflatten(0, weights.shape)", "out.unflatten(0, weights.T.shape).transpose(0, 1)", "test_moe"),
    ("activations' scales are R1's, whatever the checkpoint says", "model.py",
     "kernel.act_quant(x, self.ue8m0)", "kernel.act_quant(x)",
     "test_fp8::test_a_checkpoint_that_asks_for_it_has_activation_scales_that_are_powers_of_two"),
    ("a gate in fp32 is rounded", "convert.py",
     'name.endswith("gate.weight") and stored == torch.float32', "False",
     "test_rounding::test_a_gate_in_fp32_stays_so_as_in_huggingface"),
    ("a tied head is left out though it differs", "convert.py",
     '                self._check_tied(key, "model.embed_tokens.weight")\n', "",
     "test_checkpoint_leftovers::test_a_head_that_differs_from_the_embedding_to_which_it_is_tied_is_refused"),
    ("q and k, in another order, pass for a mapped file", "convert.py",
     " and not entry.heads and (", " and (",
     "test_convert_exact::test_tensors_that_need_no_cast_cut_or_copy_stay_mapped_files"),
    ("q and k keep HuggingFace's order", "convert.py",
     "tensor.unflatten(0, (entry.heads, 2, -1)).transpose(1, 2)", "tensor.unflatten(0, (entry.heads, 2, -1))",
     "test_model_vs_hf::test_logits_equal_huggingface[qwen2]"),
    ("every rank reads the first slice", "convert.py",
     "start = tp.rank * size", "start = 0",
     "test_cli::test_two_ranks_and_converted_folders_write_the_same_bytes[dense]"),
    ("an unfinished conversion passes for finished", "convert.py",
     'glob("model*-mp*.safetensors*")', 'glob("none")',
     "test_convert::test_a_killed_conversion_passes_for_nothing_and_goes_on_where_it_stopped"),
    ("a conversion continues the parts of another source", "convert.py",
     "- 1 if file.read(len(header)) == header else 0", "- 1",
     "test_convert::test_parts_of_another_source_are_not_continued"),
    ("top-p drops the token on the boundary", "generate.py",
     "(mass - probs < sampling.top_p)", "(mass < sampling.top_p)", "test_sampling"),
    ("the row that fills a gap leaves its cache behind", "generate.py",
     "            self.decoder.cache.copy_row(len(self.rows), slot, last.length)\n", "",
     "test_generate::test_finished_rows_are_refilled_and_idle_rows_cost_nothing"),
    ("a second sample starts without its prompt", "generate.py",
     "cache.copy_row(sources[0], slot, len(prompt))", "cache.lengths[slot] = len(prompt)",
     "test_generate::test_a_samples_tokens_depend_on_seed_prompt_and_sample_alone"),
    ("a second sample is taken for what follows the first one", "generate.py",
     "            if self.kept:\n                self.kept.tokens[:] = prompt\n", "",
     "test_generate::test_the_next_turn_runs_only_what_follows_the_common_prefix"),
    ("the end token is part of the text", "generate.py",
     'new = () if reason == "stop" else (token,)', "new = (token,)",
     "test_generate::test_finished_rows_are_refilled_and_idle_rows_cost_nothing"),
    ("the cache of the turn before is trusted one token too far", "generate.py",
     "return next((i for i, (kept, new) in pairs", "return next((i + 1 for i, (kept, new) in pairs",
     "test_generate::test_the_next_turn_runs_only_what_follows_the_common_prefix"),
    ("reasoning may go on after its budget", "generate.py",
     "            self.forced.extend(self.think.ending)\n", "            pass\n",
     "test_generate::test_a_think_budget_closes_the_reasoning_and_nothing_else"),
    ("a loop is seen in three rounds", "generate.py",
     "np.maximum(3 * PERIODS,", "np.maximum(2 * PERIODS,",
     "test_generate::test_a_loop_is_noticed_after_four_rounds_and_256_tokens"),
    ("only rank 0 stops at Ctrl-C", "generate.py",
     "    dist.broadcast(answer, src=0)\n", "",
     "test_interactive::test_a_conversation_folds_its_reasoning_and_ctrl_c_stops_an_answer_on_all_ranks[2]"),
    ("/retry draws the same numbers again", "generate.py",
     "job.run(model, [prompt], [(0, attempt)]", "job.run(model, [prompt], [(0, 0)]",
     "test_interactive::test_every_answer_is_a_sample_of_its_own"),
    ("ranks draw tokens on their own", "generate.py",
     "    if tp.size > 1:     # ranks", "    if False:     # ranks",
     "test_cli::test_ranks_with_different_seeds_produce_one_stream"),
    ("a user who writes <think> gets an answer that is all reasoning", "batch.py",
     'record["raw"].rpartition(ASSISTANT)[2]', 'record["raw"]',
     "test_cli::test_a_raw_prompt_is_what_the_model_reads_with_one_bos_in_front"),
    ("a long prompt runs in one piece", "generate.py",
     ".split(model.rt.prefill_chunk, dim=1)", ".split(len(prompt), dim=1)",
     "test_long::test_memory_is_linear_in_the_prompt_in_chunks_and_several_times_as_much_without[dense]"),
    ("each rank of a machine takes all of its memory for its own", "memory.py",
     'return room / int(os.environ.get("LOCAL_WORLD_SIZE", 1))', "return room",
     "test_long::test_free_memory_is_the_systems_or_the_containers_shared_by_its_ranks"),
    ("ranks wait for the user in the device group", "generate.py",
     "dist.broadcast_object_list(box, src=0, group=self.control)", "dist.broadcast_object_list(box, src=0)",
     "test_ranks::test_a_prompt_may_idle_for_longer_than_the_device_groups_time_out"),
    ("a grade reads the answer inside the reasoning", "tools/grading.py",
     "text.rpartition(END_THINK)", "text.partition(END_THINK)",
     "test_grading::test_without_an_open_think_the_whole_text_answers"),
    ("a grade takes an escaped brace for a real one", "tools/grading.py",
     r'r"\\.|[{}]"', 'r"[{}]"', "test_grading::test_the_last_box_counts_if_its_braces_match"),
    ("samples without an answer vote in the grade", "tools/grading.py",
     "for label in labels if label is not None)", "for label in labels)",
     "test_grading::test_a_tie_is_the_chance_of_the_right_class_in_any_order"),
    ("a graded share's variance is short by (k - 1) / k", "tools/grading.py",
     ".sum() / (k - 1)) / n)", ".sum() / k) / n)",
     "test_grading::test_errors_are_those_of_simulated_reruns_and_of_other_questions"),
    ("a graded letter is not turned back", "tools/evaluate.py",
     'str(chosen["order"]["ABCD".index(answer)])', 'str("ABCD".index(answer))',
     "test_evaluate::test_choices_are_shuffled_for_each_sample_and_letters_are_turned_back"),
    ("old reasoning goes back into the prompt", "chat.py",
     "content.rpartition(END_THINK)[2]", "content", "test_chat"),
    ("R1's tokens alone decide upon the format", "chat.py",
     "not (known and self._is_ours())", "not known",
     "test_chat::test_a_template_that_writes_another_format_with_r1s_tokens_is_obeyed"),
    ("the post-processor's BOS comes on top of the format's", "chat.py",
     "add_special_tokens=False", "add_special_tokens=True", "test_tokenizer"),
    ("a later chunk sees its own future", "attention.py",
     "None if first else bias", "None", "test_attention"),
    ("a prompt's values on a CPU are padded in front", "attention.py",
     "F.pad(v, (0, k.shape[-1] - size))", "F.pad(v, (k.shape[-1] - size, 0))", "test_attention"),
    ("scores are rounded to bf16", "attention.py",
     "scores.float(), alpha=scale)", "scores, alpha=scale).float()", "test_rounding"),
    ("a prompt's first chunk looks ahead on a GPU", "attention.py",
     "is_causal=first", "is_causal=False", "test_attention"),
    ("a compiled product forgets its bias", "products.py",
     "return y if bias is None else y + bias", "return y",
     "test_decode::test_multiply_and_sum_is_the_product"),
    ("a single query sees slots behind its row's end", "attention.py",
     "(q, k, v, bias, scale=scale).flatten", "(q, k, v, scale=scale).flatten", "test_attention"),
    ("bf16 in fp32 leaves out the last part of a matrix", "products.py",
     "else x32 @ part.float().T)", "else x32 @ part.float().T if len(part) == size else 0 * out)",
     "test_rounding"),
    ("W x^T leaves out the last part of a matrix", "products.py",
     "@ x32.T).T if", "@ x32.T).T * (len(part) == size) if", "test_rounding"),
    ("for AMX all rows get the first one's product", "products.py",
     "(w @ x2.T).T", "(w @ x2[:1].expand_as(x2).T).T", "test_rounding"),
    ("an MLP's pieces are joined in reverse", "products.py",
     "for piece in x2.split(PIECE)])", "for piece in x2.split(PIECE)[::-1]])",
     "test_rounding::test_with_amx_an_mlp_takes_many_rows_in_pieces_and_sixteens"),
    ("ranks add what lies in different orders", "model.py",
     "x = x.contiguous()      #", "#", "test_parallel::test_ranks_add_what_lies_in_the_same_order"),
    ("what experts made stays in their order", "model.py",
     "x[rows].float())", "x[:rows.numel()].view(*rows.shape, -1).float())", "test_moe"),
    ("an expert's choices are shifted by its own spare rows alone", "products.py",
     "rows + spare.cumsum(0)[chosen]", "rows + spare[chosen]", "test_moe"),
    ("experts are grouped wherever their last matrix lies", "model.py",
     "can_group(x, w1, w2, w3)", "can_group(x, w1, w3)", "test_moe"),
    ("a converted file's tensors begin anywhere", "convert.py",
     "(-(8 + len(text)) % 64)", "(-len(text) % 64)",
     "test_convert_exact::test_rank_files_are_safetensors_files_with_aligned_tensors"),
    ("the quarters of a compiled product are joined in reverse", "products.py",
     "for row in rows for part in parts]", "for row in rows for part in parts[::-1]]",
     "test_decode::test_multiply_and_sum_is_the_product"),
    ("rows that share a matrix all get the first one's product", "products.py",
     "sums(row * part)", "sums(rows[0] * part)", "test_decode::test_multiply_and_sum_is_the_product"),
    ("compiled steps leave no rows to AMX", "products.py",
     "if few(x) and not (tiles and rows > 4):", "if few(x):",
     "test_rounding::test_products_for_amx_are_the_product_rounded_once[shape1]"),
    ("quarters of an FP8 block change places", "products.py",
     "for codes in parts], dim=-1)", "for codes in parts[::-1]], dim=-1)",
     "test_decode::test_multiply_and_sum_is_the_product[256-512]"),
    ("a decoded e4m3 code loses its sign", "products.py",
     "& -0x78100000", "& 0x07F00000", "test_decode::test_multiply_and_sum_is_the_product"),
    ("a GPU's layers are compiled anew for the last slots", "decode.py",
     "for slots in (LEAST, LEAST + 128):", "for slots in (LEAST,):",
     "test_decode::test_what_is_compiled_for_a_gpu_before_the_first_answer_serves_all_lengths[dense-3]"),
    ("a step's bucket has no room for the new token", "decode.py",
     "1 << (slots - 1).bit_length()", "1 << (slots - 2).bit_length()",
     "test_decode::test_steps_on_static_buffers_equal_dynamic_ones[dense-1]"),
    ("absorbed attention in one kernel has another temperature", "attention.py",
     "keys, keys, bias, scale=scale)", "keys, keys, bias)", "test_rounding"),
    ("the sampler leaves out ids of the nucleus", "generate.py",
     "/ (2 * vocab)", "/ 2", "test_sampling"),
]


def run_tests(copy: Path, tests: str) -> None:
    """Runs one file of tests, or one test of it, in a copy of the project; pytest's output goes to a file."""
    file, *test = tests.split("::")
    os.chdir(copy)
    sys.path[0] = str(copy)         # it was the folder of this file, whose modules are not broken
    args = ["-x", "-q", "-p", "no:cacheprovider", "::".join([f"tests/{file}.py", *test])]
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if file == "interpreted":       # which Triton has to know when it is imported
        subprocess.run([sys.executable, "-m", "pytest", "--noconftest", *args],
                       env={**os.environ, "TRITON_INTERPRET": "1", "FP8_PATH": "triton"})
    else:
        pytest.main(args)


def survives(mutant: tuple[str, ...]) -> str | None:
    """None if the tests caught the mutant; otherwise what happened instead."""
    _, file, original, replacement, tests = mutant
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        source = (copy / file).read_text(encoding="utf-8")
        if source.count(original) != 1:
            return f"{file} has {source.count(original)} places that read {original!r}; update this mutant"
        (copy / file).write_text(source.replace(original, replacement), encoding="utf-8")
        process = FORKS.Process(target=run_tests, args=(copy, tests))
        process.start()
        process.join(timeout=600)
        process.kill()
        output = (copy / "output").read_text(encoding="utf-8")
        # pytest's word, not the exit code: another thread's start() asks all children for theirs, and if it
        # comes between, join() finds none and says 255
        if "\n1 failed" in output:      # a test ran and failed, no error
            return None
        return f"no test of {tests} failed\n{output[-4000:]}"


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if " ".join(sys.argv[1:]) in mutant[0]]
    if find_spec("triton") is None:
        print("without Triton, the mutants of its kernels are left out")
        chosen = [mutant for mutant in chosen if "interpreted" not in mutant[-1]]
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1")
    with ThreadPoolExecutor(max_workers=os.cpu_count() + 1) as pool:        # some tests do nothing but wait
        outcomes = list(zip(chosen, pool.map(survives, chosen)))
    for (description, file, *_), outcome in outcomes:
        print(f"{'SURVIVED' if outcome else 'killed  '}  {file}: {description}")
        if outcome:
            print(outcome)
    alive = sum(outcome is not None for _, outcome in outcomes)
    print(f"{len(outcomes) - alive} of {len(outcomes)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
