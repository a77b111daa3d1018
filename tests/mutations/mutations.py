"""For each number of docs/regressions.md, the mistake that would bring its failure back.

R38 is missing: it is owed by who builds the autoscaler.
"""

from dataclasses import dataclass

OWED = frozenset({"R38"})


@dataclass(frozen=True, slots=True)
class Mutation:
    """A text of a file below reconciler/, what a mistake makes of it, and the test that sees it."""

    number: str
    file: str
    text: str
    mistake: str
    test: str  # below tests/

    def applied(self, source: str) -> str:
        """Return the file's source with the mistake in it."""
        assert source.count(self.text) == 1, f"{self.number}: not once in {self.file}"
        return source.replace(self.text, self.mistake)


MUTATIONS = (
    Mutation(
        "R01",
        "adapters/slurm_cli.py",
        'raise SlurmUnavailable(f"{argv[0]}: {_one_line(done.stderr)}")',
        'return ""',
        "unit/test_slurm_cli.py::test_R01_queue_that_can_not_be_read_is_an_error",
    ),
    Mutation(
        "R02",
        "memory.py",
        "return memory.emptied_at is not None and at - memory.emptied_at < CONFIRM_S",
        "return False",
        "unit/test_planner.py::test_R02_empty_listing_is_confirmed_before_it_is_believed",
    ),
    Mutation(
        "R03",
        "adapters/slurm_cli.py",
        r'(?:;\S*)?$", re.MULTILINE)',
        r'(?:;\S*)?$")',
        "unit/test_slurm_cli.py::test_R03_submit_with_banner_lines_returns_the_id",
    ),
    Mutation(
        "R04",
        "adapters/slurm_cli.py",
        'SubmitUnknown(f"sbatch gave no answer',
        'SubmitRejected(f"sbatch gave no answer',
        "unit/test_slurm_cli.py::test_R04_submit_without_an_answer_in_time_is_unknown",
    ),
    Mutation(
        "R05",
        "execute.py",
        "_Begun(at, action, journal.intend(action))",
        "_Begun(at, action, None)",
        "unit/test_execute.py::test_R05_intent_is_written_before_and_outcome_after_each_effect",
    ),
    Mutation(
        "R06",
        "adapters/lock.py",
        "    try:\n        fcntl.flock(",
        "    try:\n        if os.fstat(lock).st_size: raise BlockingIOError\n        fcntl.flock(",
        "unit/test_lock.py::test_R06_lock_of_a_dead_process_is_free_at_once",
    ),
    Mutation(
        "R07",
        "spec.py",
        "hours, minutes, seconds = [*parts, 0, 0][:3]",
        "hours, minutes, seconds = [0, 0, *parts][-3:]",
        "unit/test_spec.py::test_R07_duration_in_every_form_of_slurm_is_read",
    ),
    Mutation(
        "R08",
        "naming.py",
        "except (ValueError, KeyError, TypeError, RecursionError):",
        "except (KeyError, TypeError):",
        "unit/test_slurm_cli.py::test_R08_vandalised_comment_spoils_one_job_only",
    ),
    Mutation(
        "R09",
        "planner/model.py",
        "return (progress(job, seen), answers,",
        "return (-progress(job, seen), answers,",
        "unit/test_planner.py::test_R09_surplus_leaves_in_the_order_of_what_it_costs",
    ),
    Mutation(
        "R10",
        "planner/seen.py",
        "MISSES_TO_DEROUTE = 2",
        "MISSES_TO_DEROUTE = 1",
        "unit/test_planner.py::test_R10_one_failed_probe_changes_nothing",
    ),
    Mutation(
        "R11",
        "adapters/engine.py",
        "asyncio.Semaphore(_AT_ONCE)",
        "asyncio.Semaphore(len(jobs))",
        "contract/test_engines.py::test_R11_no_more_replicas_are_asked_at_once_than_can_be_read",
    ),
    Mutation(
        "R12",
        "replica.sh",
        'on $SLURMD_NODENAME"\n  return 1',
        'on $SLURMD_NODENAME"',
        "unit/test_regressions.py::test_R12_port_range_that_is_used_up_ends_with_a_clear_error",
    ),
    Mutation(
        "R13",
        "planner/seen.py",
        "if self.hung(job) else",
        'if self.hung(job) or "error" in probe.detail.lower() else',
        "unit/test_regressions.py"
        "::test_R13_frightening_words_of_a_replica_that_answers_mean_nothing",
    ),
    Mutation(
        "R14",
        "state.py",
        "moved = run.node not in self.node_names or",
        "moved = run.node not in self.nodes or",
        "unit/test_regressions.py"
        "::test_R14_names_that_look_like_parts_of_an_address_change_no_address",
    ),
    Mutation(
        "R15",
        "batch.py",
        "map(shlex.quote, words)",
        "words",
        "unit/test_batch.py::test_R15_arguments_arrive_intact",
    ),
    Mutation(
        "R16",
        "spec.py",
        'extra="forbid"',
        'extra="ignore"',
        "unit/test_regressions.py::test_R16_misspelled_key_is_refused_with_a_hint",
    ),
    Mutation(
        "R17",
        "planner/seen.py",
        "(job for job in ours if job.phase is not Phase.ENDED)",
        '(job for job in ours if job.state != "COMPLETED")',
        "unit/test_planner.py::test_R17_ended_job_leaves_the_upstream_in_one_cycle",
    ),
    Mutation(
        "R18",
        "planner/__init__.py",
        "if status is Status.READY and job.run is not None:",
        "if job.run and {seen.status(one) for one in seen.live} == {Status.READY}:",
        "unit/test_planner.py::test_R18_gateway_serves_with_whatever_is_ready",
    ),
    Mutation(
        "R19",
        "planner/model.py",
        "ready = len(serving) + case.ready(current)",
        "ready = len(serving) + len(current)",
        "unit/test_planner.py::test_R19_stale_replica_stays_while_its_successor_loads",
    ),
    Mutation(
        "R20",
        "state.py",
        "PHASES.get(self.state, Phase.UNKNOWN)",
        "PHASES.get(self.state, Phase.ENDED)",
        "unit/test_planner.py::test_R20_state_of_slurm_has_a_defined_meaning",
    ),
    Mutation(
        "R21",
        "state.py",
        " or run.restarts != self.restarts",
        "",
        "unit/test_planner.py::test_R21_requeued_job_loses_its_address",
    ),
    Mutation(
        "R22",
        "execute.py",
        "if present.get(job.key) != str(job.name):",
        "if str(job.name) not in present.values():",
        "unit/test_execute.py::test_R22_job_whose_submit_time_changed_is_not_ended",
    ),
    Mutation(
        "R23",
        "batch.py",
        "gpu:{model.resources.gpus}",
        "gpu:{1 << (model.resources.gpus - 1).bit_length()}",
        "unit/test_batch.py::test_R23_resources_are_asked_for_as_written",
    ),
    Mutation(
        "R24",
        "planner/seen.py",
        "if self.status(job) is not Status.STARTING or job.started_at is None:\n"
        "            return False\n        return self.at - job.started_at >",
        "if self.status(job) not in (Status.PENDING, Status.STARTING):\n"
        "            return False\n        return self.at - job.submitted_at >",
        "unit/test_planner.py::test_R24_pending_for_hours_is_no_failure",
    ),
    Mutation(
        "R25",
        "failures.py",
        "count = 0 if mended else seen.count",
        "count = 0",
        "unit/test_failures.py"
        "::test_R25_failing_replica_backs_off_beside_one_that_has_long_been_ready",
    ),
    Mutation(
        "R26",
        "replica.sh",
        'flock -n "$port_lock" && return 0',
        "return 0",
        "unit/test_regressions.py::test_R26_port_that_is_reserved_is_not_chosen_again",
    ),
    Mutation(
        "R27",
        "naming.py",
        "match = _NAME.fullmatch(text)",
        "match = _NAME.match(text)",
        "unit/test_naming.py::test_R27_name_of_another_shape_is_foreign",
    ),
    Mutation(
        "R28",
        "execute.py",
        "present)\n            world.slurm.cancel(",
        "_present([action], fleet, world.slurm))\n            world.slurm.cancel(",
        "unit/test_regressions.py"
        "::test_R28_cycle_asks_slurm_three_times_at_most_for_a_thousand_jobs",
    ),
    Mutation(
        "R29",
        "adapters/gateway.sh",
        'nginx -t -q -e stderr -c "$part/nginx.conf"',
        'nginx -t -q -e stderr -c "$part/nginx.conf" || true',
        "unit/test_gateway_sh.py::test_R29_configuration_that_nginx_refuses_changes_nothing",
    ),
    Mutation(
        "R30",
        "adapters/engine.py",
        "num_requests_(?:running|waiting)",
        "num_requests_(?:running)",
        "contract/test_engines.py::test_R30_ongoing_is_read_from_a_recorded_scrape_of_real_vllm",
    ),
    Mutation(
        "R31",
        "memory.py",
        "jump_s = _jump_s(memory, observation)",
        "jump_s = 0.0",
        "unit/test_memory.py::test_R31_clock_that_jumps_moves_every_timer_along",
    ),
    Mutation(
        "R32",
        "adapters/store.py",
        "{sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}",
        "{sqlite3.SQLITE_CORRUPT}",
        "unit/test_store.py::test_R32_damaged_file_is_set_aside_and_a_fresh_one_used",
    ),
    Mutation(
        "R33",
        "planner/guard.py",
        "return protected or seen.status(job) is Status.READY or job.key in seen.routed",
        "return protected",
        "unit/test_planner.py::test_R33_block_deleted_by_accident_ends_no_serving_replica",
    ),
    Mutation(
        "R34",
        "adapters/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "unit/test_lock.py::test_R34_lock_of_another_process_is_refused_by_name",
    ),
    Mutation(
        "R35",
        "spec.py",
        """yield _unreadable(folder, f"can't be read: {error.strerror}")""",
        "pass",
        "unit/test_spec.py::test_R35_model_folder_that_can_not_be_read_is_never_no_models",
    ),
    Mutation(
        "R36",
        "adapters/slurm_cli.py",
        "{key: os.environ[key] for key in _PASSED if key in os.environ}",
        "dict(os.environ)",
        "unit/test_slurm_cli.py::test_R36_commands_see_nothing_of_our_environment",
    ),
    Mutation(
        "R37",
        "naming.py",
        "{IPv4Address(host)}:{port}",
        "{host}:{port}",
        "unit/test_regressions.py"
        "::test_R37_address_in_a_vandalised_comment_never_reaches_a_gateway",
    ),
    Mutation(
        "R39",
        "gateway.conf",
        "    proxy_buffering off;\n",
        "    proxy_buffering off;\n    proxy_ignore_client_abort on;\n",
        "gateway/test_log.py::test_R39_client_that_leaves_ends_its_request_at_the_replica_too",
    ),
    Mutation(
        "R40",
        "planner/model.py",
        "if seen.must_go(model, job)",
        "if case.is_expiring(job)",
        "unit/test_rollover.py::test_R40_without_a_ready_successor_it_serves_until_its_last_moment",
    ),
)
