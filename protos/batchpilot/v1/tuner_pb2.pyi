from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Binding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BINDING_UNSPECIFIED: _ClassVar[Binding]
    BINDING_NONE: _ClassVar[Binding]
    BINDING_KV_CACHE: _ClassVar[Binding]
    BINDING_MAX_NUM_SEQS: _ClassVar[Binding]
    BINDING_TOKEN_BUDGET: _ClassVar[Binding]

class Detail(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DETAIL_UNSPECIFIED: _ClassVar[Detail]
    DETAIL_WINDOW: _ClassVar[Detail]
    DETAIL_STEPS: _ClassVar[Detail]
BINDING_UNSPECIFIED: Binding
BINDING_NONE: Binding
BINDING_KV_CACHE: Binding
BINDING_MAX_NUM_SEQS: Binding
BINDING_TOKEN_BUDGET: Binding
DETAIL_UNSPECIFIED: Detail
DETAIL_WINDOW: Detail
DETAIL_STEPS: Detail

class EngineId(_message.Message):
    __slots__ = ("group", "engine", "data_parallel_rank")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DATA_PARALLEL_RANK_FIELD_NUMBER: _ClassVar[int]
    group: str
    engine: str
    data_parallel_rank: int
    def __init__(self, group: _Optional[str] = ..., engine: _Optional[str] = ..., data_parallel_rank: _Optional[int] = ...) -> None: ...

class BatchLimits(_message.Message):
    __slots__ = ("max_num_seqs", "max_num_batched_tokens")
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_num_seqs: int
    max_num_batched_tokens: int
    def __init__(self, max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ...) -> None: ...

class EngineFacts(_message.Message):
    __slots__ = ("startup_limits", "total_blocks", "block_size", "tokens_per_decode", "unchunked_prefill_tokens", "kv_growth_share", "kv_window_tokens")
    STARTUP_LIMITS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_DECODE_FIELD_NUMBER: _ClassVar[int]
    UNCHUNKED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_GROWTH_SHARE_FIELD_NUMBER: _ClassVar[int]
    KV_WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    startup_limits: BatchLimits
    total_blocks: int
    block_size: int
    tokens_per_decode: int
    unchunked_prefill_tokens: int
    kv_growth_share: float
    kv_window_tokens: int
    def __init__(self, startup_limits: _Optional[_Union[BatchLimits, _Mapping]] = ..., total_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., tokens_per_decode: _Optional[int] = ..., unchunked_prefill_tokens: _Optional[int] = ..., kv_growth_share: _Optional[float] = ..., kv_window_tokens: _Optional[int] = ...) -> None: ...

class EngineHello(_message.Message):
    __slots__ = ("id", "facts", "model_name", "vllm_version", "batchpilot_version", "itl_slo_ms", "ttft_slo_ms", "min_num_seqs", "min_prefill_chunk", "follows_targets")
    ID_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    VLLM_VERSION_FIELD_NUMBER: _ClassVar[int]
    BATCHPILOT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ITL_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    MIN_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MIN_PREFILL_CHUNK_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_TARGETS_FIELD_NUMBER: _ClassVar[int]
    id: EngineId
    facts: EngineFacts
    model_name: str
    vllm_version: str
    batchpilot_version: str
    itl_slo_ms: float
    ttft_slo_ms: float
    min_num_seqs: int
    min_prefill_chunk: int
    follows_targets: bool
    def __init__(self, id: _Optional[_Union[EngineId, _Mapping]] = ..., facts: _Optional[_Union[EngineFacts, _Mapping]] = ..., model_name: _Optional[str] = ..., vllm_version: _Optional[str] = ..., batchpilot_version: _Optional[str] = ..., itl_slo_ms: _Optional[float] = ..., ttft_slo_ms: _Optional[float] = ..., min_num_seqs: _Optional[int] = ..., min_prefill_chunk: _Optional[int] = ..., follows_targets: bool = ...) -> None: ...

class TelemetryWindow(_message.Message):
    __slots__ = ("seconds", "steps", "busy_seconds", "slowest_step_seconds", "decode_tokens", "decode_seconds", "slow_decode_tokens", "prefill_tokens", "running_seconds", "kv_token_seconds", "peak_running", "peak_kv_tokens", "preemptions", "recomputed_tokens", "arrived", "arrived_prompt_tokens", "finished", "finished_output_tokens", "kv_bound_steps", "seqs_bound_steps", "tokens_bound_steps", "running", "waiting", "prefill_seqs", "used_blocks", "limits")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLOWEST_STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SLOW_DECODE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_RUNNING_FIELD_NUMBER: _ClassVar[int]
    PEAK_KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BOUND_STEPS_FIELD_NUMBER: _ClassVar[int]
    SEQS_BOUND_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_BOUND_STEPS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SEQS_FIELD_NUMBER: _ClassVar[int]
    USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    steps: int
    busy_seconds: float
    slowest_step_seconds: float
    decode_tokens: int
    decode_seconds: float
    slow_decode_tokens: int
    prefill_tokens: int
    running_seconds: float
    kv_token_seconds: float
    peak_running: int
    peak_kv_tokens: int
    preemptions: int
    recomputed_tokens: int
    arrived: int
    arrived_prompt_tokens: int
    finished: int
    finished_output_tokens: int
    kv_bound_steps: int
    seqs_bound_steps: int
    tokens_bound_steps: int
    running: int
    waiting: int
    prefill_seqs: int
    used_blocks: int
    limits: BatchLimits
    def __init__(self, seconds: _Optional[float] = ..., steps: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., slowest_step_seconds: _Optional[float] = ..., decode_tokens: _Optional[int] = ..., decode_seconds: _Optional[float] = ..., slow_decode_tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., running_seconds: _Optional[float] = ..., kv_token_seconds: _Optional[float] = ..., peak_running: _Optional[int] = ..., peak_kv_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., arrived: _Optional[int] = ..., arrived_prompt_tokens: _Optional[int] = ..., finished: _Optional[int] = ..., finished_output_tokens: _Optional[int] = ..., kv_bound_steps: _Optional[int] = ..., seqs_bound_steps: _Optional[int] = ..., tokens_bound_steps: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., prefill_seqs: _Optional[int] = ..., used_blocks: _Optional[int] = ..., limits: _Optional[_Union[BatchLimits, _Mapping]] = ...) -> None: ...

class StepRecord(_message.Message):
    __slots__ = ("seconds", "running", "decode_seqs", "prefill_tokens", "kv_tokens", "preemptions", "recomputed_tokens", "finished", "arrived_prompt_tokens", "binding", "regular", "prefill_squares", "cached_tokens")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DECODE_SEQS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    REGULAR_FIELD_NUMBER: _ClassVar[int]
    PREFILL_SQUARES_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    running: int
    decode_seqs: int
    prefill_tokens: int
    kv_tokens: int
    preemptions: int
    recomputed_tokens: int
    finished: _containers.RepeatedCompositeFieldContainer[FinishedRequest]
    arrived_prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    binding: Binding
    regular: bool
    prefill_squares: int
    cached_tokens: int
    def __init__(self, seconds: _Optional[float] = ..., running: _Optional[int] = ..., decode_seqs: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., recomputed_tokens: _Optional[int] = ..., finished: _Optional[_Iterable[_Union[FinishedRequest, _Mapping]]] = ..., arrived_prompt_tokens: _Optional[_Iterable[int]] = ..., binding: _Optional[_Union[Binding, str]] = ..., regular: bool = ..., prefill_squares: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class FinishedRequest(_message.Message):
    __slots__ = ("prompt_tokens", "output_tokens", "completed")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    output_tokens: int
    completed: bool
    def __init__(self, prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., completed: bool = ...) -> None: ...

class SequenceColumns(_message.Message):
    __slots__ = ("kv_tokens", "output_tokens", "prefill_tokens_left")
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    kv_tokens: _containers.RepeatedScalarFieldContainer[int]
    output_tokens: _containers.RepeatedScalarFieldContainer[int]
    prefill_tokens_left: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kv_tokens: _Optional[_Iterable[int]] = ..., output_tokens: _Optional[_Iterable[int]] = ..., prefill_tokens_left: _Optional[_Iterable[int]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("sequence", "window", "source", "binding", "clamps", "dropped_reports", "lease_remaining_ms", "steps", "running", "waiting", "local_limits", "tokens_per_decode", "outside_blocks")
    class ClampsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    CLAMPS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_REPORTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    LOCAL_LIMITS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_DECODE_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    window: TelemetryWindow
    source: str
    binding: Binding
    clamps: _containers.ScalarMap[str, int]
    dropped_reports: int
    lease_remaining_ms: int
    steps: _containers.RepeatedCompositeFieldContainer[StepRecord]
    running: SequenceColumns
    waiting: SequenceColumns
    local_limits: BatchLimits
    tokens_per_decode: float
    outside_blocks: int
    def __init__(self, sequence: _Optional[int] = ..., window: _Optional[_Union[TelemetryWindow, _Mapping]] = ..., source: _Optional[str] = ..., binding: _Optional[_Union[Binding, str]] = ..., clamps: _Optional[_Mapping[str, int]] = ..., dropped_reports: _Optional[int] = ..., lease_remaining_ms: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepRecord, _Mapping]]] = ..., running: _Optional[_Union[SequenceColumns, _Mapping]] = ..., waiting: _Optional[_Union[SequenceColumns, _Mapping]] = ..., local_limits: _Optional[_Union[BatchLimits, _Mapping]] = ..., tokens_per_decode: _Optional[float] = ..., outside_blocks: _Optional[int] = ...) -> None: ...

class TuneRequest(_message.Message):
    __slots__ = ("hello", "report")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hello: EngineHello
    report: Report
    def __init__(self, hello: _Optional[_Union[EngineHello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session_id", "report_interval_ms", "detail", "policy", "itl_slo_ms", "ttft_slo_ms", "problem")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ITL_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    report_interval_ms: int
    detail: Detail
    policy: str
    itl_slo_ms: float
    ttft_slo_ms: float
    problem: str
    def __init__(self, session_id: _Optional[str] = ..., report_interval_ms: _Optional[int] = ..., detail: _Optional[_Union[Detail, str]] = ..., policy: _Optional[str] = ..., itl_slo_ms: _Optional[float] = ..., ttft_slo_ms: _Optional[float] = ..., problem: _Optional[str] = ...) -> None: ...

class LimitsLease(_message.Message):
    __slots__ = ("sequence", "limits", "lease_ms", "source", "reason", "policy")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    limits: BatchLimits
    lease_ms: int
    source: str
    reason: str
    policy: str
    def __init__(self, sequence: _Optional[int] = ..., limits: _Optional[_Union[BatchLimits, _Mapping]] = ..., lease_ms: _Optional[int] = ..., source: _Optional[str] = ..., reason: _Optional[str] = ..., policy: _Optional[str] = ...) -> None: ...

class TuneResponse(_message.Message):
    __slots__ = ("welcome", "lease")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    lease: LimitsLease
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., lease: _Optional[_Union[LimitsLease, _Mapping]] = ...) -> None: ...

class GetLimitsRequest(_message.Message):
    __slots__ = ("id", "hello", "report")
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    id: EngineId
    hello: EngineHello
    report: Report
    def __init__(self, id: _Optional[_Union[EngineId, _Mapping]] = ..., hello: _Optional[_Union[EngineHello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class GetLimitsResponse(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LimitsLease
    def __init__(self, lease: _Optional[_Union[LimitsLease, _Mapping]] = ...) -> None: ...

class ListEnginesRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class ListEnginesResponse(_message.Message):
    __slots__ = ("engines",)
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ...) -> None: ...

class WatchEngineRequest(_message.Message):
    __slots__ = ("group", "engine", "interval_ms")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    group: str
    engine: str
    interval_ms: int
    def __init__(self, group: _Optional[str] = ..., engine: _Optional[str] = ..., interval_ms: _Optional[int] = ...) -> None: ...

class WatchEngineResponse(_message.Message):
    __slots__ = ("engines", "gone")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineStatus]
    gone: _containers.RepeatedCompositeFieldContainer[EngineId]
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineStatus, _Mapping]]] = ..., gone: _Optional[_Iterable[_Union[EngineId, _Mapping]]] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("id", "hello", "window", "binding", "applied_limits", "source", "lease", "report_age_ms", "session_seconds", "canary", "problem", "lease_age_ms", "itl_slo_ms", "ttft_slo_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BINDING_FIELD_NUMBER: _ClassVar[int]
    APPLIED_LIMITS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    SESSION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LEASE_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    ITL_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_MS_FIELD_NUMBER: _ClassVar[int]
    id: EngineId
    hello: EngineHello
    window: TelemetryWindow
    binding: Binding
    applied_limits: BatchLimits
    source: str
    lease: LimitsLease
    report_age_ms: int
    session_seconds: float
    canary: bool
    problem: str
    lease_age_ms: int
    itl_slo_ms: float
    ttft_slo_ms: float
    def __init__(self, id: _Optional[_Union[EngineId, _Mapping]] = ..., hello: _Optional[_Union[EngineHello, _Mapping]] = ..., window: _Optional[_Union[TelemetryWindow, _Mapping]] = ..., binding: _Optional[_Union[Binding, str]] = ..., applied_limits: _Optional[_Union[BatchLimits, _Mapping]] = ..., source: _Optional[str] = ..., lease: _Optional[_Union[LimitsLease, _Mapping]] = ..., report_age_ms: _Optional[int] = ..., session_seconds: _Optional[float] = ..., canary: bool = ..., problem: _Optional[str] = ..., lease_age_ms: _Optional[int] = ..., itl_slo_ms: _Optional[float] = ..., ttft_slo_ms: _Optional[float] = ...) -> None: ...

class ListPoliciesRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class PolicyInfo(_message.Message):
    __slots__ = ("policy", "summary", "sha256", "problem", "in_use")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    summary: str
    sha256: str
    problem: str
    in_use: bool
    def __init__(self, policy: _Optional[str] = ..., summary: _Optional[str] = ..., sha256: _Optional[str] = ..., problem: _Optional[str] = ..., in_use: bool = ...) -> None: ...

class ListPoliciesResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyInfo]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicyInfo, _Mapping]]] = ...) -> None: ...

class ListGroupsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListGroupsResponse(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupPolicy]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupPolicy, _Mapping]]] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class GroupPolicy(_message.Message):
    __slots__ = ("group", "policy", "canary_policy", "canary_share", "history", "canary_state", "canary_problem", "held_policy", "held_seconds_left", "engines")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CANARY_POLICY_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CANARY_STATE_FIELD_NUMBER: _ClassVar[int]
    CANARY_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    HELD_POLICY_FIELD_NUMBER: _ClassVar[int]
    HELD_SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    group: str
    policy: str
    canary_policy: str
    canary_share: float
    history: _containers.RepeatedScalarFieldContainer[str]
    canary_state: str
    canary_problem: str
    held_policy: str
    held_seconds_left: float
    engines: int
    def __init__(self, group: _Optional[str] = ..., policy: _Optional[str] = ..., canary_policy: _Optional[str] = ..., canary_share: _Optional[float] = ..., history: _Optional[_Iterable[str]] = ..., canary_state: _Optional[str] = ..., canary_problem: _Optional[str] = ..., held_policy: _Optional[str] = ..., held_seconds_left: _Optional[float] = ..., engines: _Optional[int] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("group_policy",)
    GROUP_POLICY_FIELD_NUMBER: _ClassVar[int]
    group_policy: GroupPolicy
    def __init__(self, group_policy: _Optional[_Union[GroupPolicy, _Mapping]] = ...) -> None: ...

class PromotePolicyRequest(_message.Message):
    __slots__ = ("group", "policy", "canary_share", "hold_seconds")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    CANARY_SHARE_FIELD_NUMBER: _ClassVar[int]
    HOLD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    group: str
    policy: str
    canary_share: float
    hold_seconds: float
    def __init__(self, group: _Optional[str] = ..., policy: _Optional[str] = ..., canary_share: _Optional[float] = ..., hold_seconds: _Optional[float] = ...) -> None: ...

class PromotePolicyResponse(_message.Message):
    __slots__ = ("group_policy",)
    GROUP_POLICY_FIELD_NUMBER: _ClassVar[int]
    group_policy: GroupPolicy
    def __init__(self, group_policy: _Optional[_Union[GroupPolicy, _Mapping]] = ...) -> None: ...

class RollBackPolicyRequest(_message.Message):
    __slots__ = ("group",)
    GROUP_FIELD_NUMBER: _ClassVar[int]
    group: str
    def __init__(self, group: _Optional[str] = ...) -> None: ...

class RollBackPolicyResponse(_message.Message):
    __slots__ = ("group_policy",)
    GROUP_POLICY_FIELD_NUMBER: _ClassVar[int]
    group_policy: GroupPolicy
    def __init__(self, group_policy: _Optional[_Union[GroupPolicy, _Mapping]] = ...) -> None: ...
