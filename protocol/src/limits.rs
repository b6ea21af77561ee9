//! Every bound that the programs share, in one place, with the relations between them asserted.
//!
//! A limit on a payload is on the bytes before the envelope; a packet carries the envelope as well.

/// A name: job, namespace, node, cluster, container, volume (RFC 1123 label).
pub const NAME_BYTES_MAX: usize = 63;
/// An opaque identifier: a request's id, a nonce, a ledger's or store's id.
pub const TOKEN_BYTES_MAX: usize = 64;

/// A job file as submitted.
pub const JOB_FILE_BYTES_MAX: usize = 32 * 1024;
/// Nesting of a job file.
pub const JOB_FILE_DEPTH_MAX: usize = 32;
/// Errors told at once about one job file.
pub const JOB_FILE_ERRORS_MAX: usize = 20;
/// A pod's spec on the wire.
pub const SPEC_BYTES_MAX: usize = 32 * 1024;
/// Any other message.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// What the envelope may add to a message.
pub const ENVELOPE_BYTES_MAX: usize = 1024;
/// An MQTT packet, topic and headers included.
pub const PACKET_BYTES_MAX: usize = 96 * 1024;
/// Slashes in a topic: what the narrowest broker of those we know allows, less one.
pub const TOPIC_SLASHES_MAX: usize = 6;

/// Pods that a node's desired set may name, those being stopped included.
pub const PODS_PER_NODE_MAX: usize = 256;
/// Pods of which a node's desired set may say that they are to come.
pub const STAGES_PER_NODE_MAX: usize = 16;
/// Pods that a job's status lists; all are counted.
pub const STATUS_PODS_MAX: usize = 100;
/// Pods of one job, and its parallelism.
pub const PODS_PER_JOB_MAX: u32 = 100_000;
pub const PARALLELISM_MAX: u32 = 10_000;
/// Containers of one pod.
pub const CONTAINERS_PER_POD_MAX: usize = 16;
/// Volumes, outputs, tolerations, preferences, secrets: each list of a job.
pub const JOB_LIST_MAX: usize = 64;
/// Arguments and environment variables of one container.
pub const ARGS_MAX: usize = 1024;
/// A CEL expression.
pub const CEL_BYTES_MAX: usize = 1024;
/// Steps that evaluating it on one node may take.
pub const CEL_STEPS_MAX: u64 = 4_000;
/// Labels and taints of a node.
pub const LABELS_PER_NODE_MAX: usize = 64;
pub const LABEL_BYTES_MAX: usize = 253;
/// GPUs of one node, and of one pod.
pub const GPUS_PER_NODE_MAX: usize = 64;
pub const GPU_MILLI_FULL: u32 = 1000;
/// Images of which a node tells that it holds them, the most recently used, and the bytes of their names together.
pub const IMAGES_PER_NODE_MAX: usize = 64;
pub const IMAGES_PER_NODE_BYTES_MAX: usize = 8 * 1024;
/// A node's policy, as it tells of it.
pub const POLICY_BYTES_MAX: usize = 4 * 1024;

pub const CPU_MILLI_MAX: u64 = 1_000_000_000;
pub const MEMORY_BYTES_MAX: u64 = 1 << 50;
/// The least memory that a container's processes can start in.
pub const MEMORY_BYTES_MIN: u64 = 4 << 20;
pub const DURATION_MS_MAX: u64 = 10 * 365 * 24 * 3_600_000;
pub const PRIORITY_MAX: i32 = 1000;
pub const BACKOFF_LIMIT_MAX: u32 = 10_000;
pub const CHECKPOINTS_KEPT_MAX: u32 = 100;

/// A chunk of a checkpoint before compression: memory is cut at multiples of it in virtual addresses.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Chunks sent to the depot in one request, which it keeps as one pack.
pub const PACK_BYTES_MAX: usize = 16 << 20;
/// Chunks named in one question which of them the depot lacks, and those asked of it at once.
pub const CHUNKS_ASKED_MAX: usize = 16 * 1024;
pub const CHUNKS_FETCHED_MAX: usize = 64;
/// A manifest, some 85 bytes a chunk: enough for a pod of half a terabyte.
pub const MANIFEST_BYTES_MAX: usize = 64 << 20;
/// Files of one container's images.
pub const IMAGE_FILES_MAX: usize = 64 * 1024;
pub const IMAGE_NAME_BYTES_MAX: usize = 128;
/// Features of a processor, and a version's text, in what a checkpoint needs.
pub const CPU_FEATURES_MAX: usize = 512;
pub const VERSION_BYTES_MAX: usize = 128;

/// Scratch volumes up to this size are memory, charged to who writes it; larger ones lie on the node's disk.
pub const SCRATCH_MEMORY_BYTES_MAX: u64 = 64 << 20;

/// What a pod's outputs may take, packed.
pub const OUTPUT_BYTES_MAX: u64 = 8 << 30;
/// What the directory that travels with a job may take, packed.
pub const WORKSPACE_BYTES_MAX: u64 = 100 << 20;

/// Events in one message of a node's outbox, and those that may wait in it.
pub const EVENTS_PER_MESSAGE_MAX: usize = 64;
pub const OUTBOX_EVENTS_MAX: usize = 16 * 1024;
/// A reason (a CamelCase word) and a message for people.
pub const REASON_BYTES_MAX: usize = 64;
pub const HUMAN_MESSAGE_BYTES_MAX: usize = 1024;

/// A node's or the depot's address.
pub const URL_BYTES_MAX: usize = 256;

/// One record of a log: what a single read of the container's pipe brought, cut at a line where possible.
pub const LOG_RECORD_BYTES_MAX: usize = 16 * 1024;
/// Rows in one page of a query's reply.
pub const QUERY_PAGE_ROWS_MAX: usize = 100;

/// The heartbeat's period, and its period while the last one stands unanswered.
pub const HEARTBEAT_MS: u64 = 10_000;
pub const HEARTBEAT_RETRY_MS: u64 = 2_000;
/// Without a grant for this long a pod does what its job says.
pub const DISCONNECT_AFTER_MS: u64 = 40_000;
pub const DISCONNECT_AFTER_MS_MIN: u64 = 20_000;
/// From the start of a freeze to SIGKILL where the kernel has not confirmed it.
pub const FREEZE_CONFIRM_MS: u64 = 10_000;
/// What the controller waits beyond a lease before it replaces a pod.
pub const LEASE_MARGIN_MS: u64 = 5_000;
/// Silence after which a node counts as lost.
pub const LOST_AFTER_MS: u64 = 60_000;
/// `desired` is sent again after the first, doubling to the second, until the node reports its generation.
pub const DESIRED_RESEND_MS_MIN: u64 = 2_000;
pub const DESIRED_RESEND_MS_MAX: u64 = 30_000;
/// A request to follow logs lapses unless it is repeated.
pub const FOLLOW_MS: u64 = 30_000;
/// Ids of submits and commands are remembered this long.
pub const REQUEST_ID_KEPT_MS: u64 = 30 * 24 * 3_600_000;
/// A status is published at most this often a job.
pub const STATUS_PUBLISH_MS_MIN: u64 = 200;
/// How long `status` says `Rejected`.
pub const REJECTED_STATUS_MS: u64 = 3_600_000;

const _: () = assert!(SPEC_BYTES_MAX <= MESSAGE_BYTES_MAX);
const _: () = assert!(MESSAGE_BYTES_MAX + ENVELOPE_BYTES_MAX < PACKET_BYTES_MAX);
// A hello tells of pods, devices and labels too; a path's quotes are escaped, each name is quoted.
const _: () = assert!(
    2 * IMAGES_PER_NODE_BYTES_MAX + 3 * IMAGES_PER_NODE_MAX + POLICY_BYTES_MAX < MESSAGE_BYTES_MAX / 3
);
const _: () = assert!(CHUNKS_FETCHED_MAX * (CHUNK_BYTES_MAX + 64) <= 2 * MANIFEST_BYTES_MAX);
const _: () = assert!(CHUNK_BYTES_MAX * 2 < PACK_BYTES_MAX);
const _: () = assert!(LOG_RECORD_BYTES_MAX * 2 < MESSAGE_BYTES_MAX);
const _: () = assert!(HEARTBEAT_RETRY_MS < HEARTBEAT_MS && 2 * HEARTBEAT_MS <= DISCONNECT_AFTER_MS_MIN);
// A silent node's pods have stopped before the controller may start them elsewhere (fencing: 1 + 50 + 5 <= 61).
const _: () = assert!(DISCONNECT_AFTER_MS + FREEZE_CONFIRM_MS + LEASE_MARGIN_MS <= LOST_AFTER_MS);
const _: () = assert!(DISCONNECT_AFTER_MS_MIN <= DISCONNECT_AFTER_MS);

/// Nodes and users that belong to one cluster.
pub const MEMBERS_MAX: usize = 50_000;
/// Namespaces in which one user has a role.
pub const ROLES_MAX: usize = 64;
/// How far the time of a signed request may be from the controller's.
pub const REQUEST_AGE_MS_MAX: u64 = 10 * 60 * 1_000;
/// A secret's value.
pub const SECRET_BYTES_MAX: usize = 64 * 1024;
/// Of all of a cluster's.
pub const SECRETS_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Of all that one pod mounts: its supervisor keeps them in memory.
pub const POD_SECRETS_BYTES_MAX: usize = 1024 * 1024;
/// Invitations that may be open at once.
pub const INVITATIONS_MAX: usize = 1_000;
/// How long one may be taken, where nothing else is said.
pub const INVITATION_MS: u64 = 15 * 60 * 1_000;
/// How long a machine that an admin has to approve waits for that. Of each invitation at most one waits.
pub const WAITING_MS: u64 = 24 * 60 * 60 * 1_000;
