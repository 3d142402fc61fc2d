//! Packed models: the bits of their checkpoints, whatever happened while they were made; and broken ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use expertmesh_engine::{ExpertStore, NotBrought, PackedModel, PrepareOptions, Prepared, Supply, prepare};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::numerics::Numerics;
use proptest::prelude::*;

use super::corrupted::damage;
use super::*;

const FORMATS: [WeightFormat; 4] =
    [WeightFormat::Bf16, WeightFormat::Fp8, WeightFormat::Int8, WeightFormat::Int4];

#[test]
fn every_weight_format_that_can_be_packed_is_compared() {
    let packed = WeightFormat::ALL.into_iter().filter(|&weights| weights != WeightFormat::Native);
    assert!(packed.eq(FORMATS));
}

/// A directory that is removed in the end.
#[derive(Debug)]
pub(super) struct Out(pub(super) PathBuf);

impl Out {
    pub(super) fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("expertmesh-packed-{test}-{}", std::process::id()));
        fs::remove_dir_all(&path).ok();
        Self(path)
    }

    /// Of a golden's model, by one thread.
    pub(super) fn of(test: &str, golden: &str, weights: WeightFormat) -> Self {
        let out = Self::new(test);
        out.prepare(golden, &options(weights)).unwrap();
        out
    }

    fn prepare(&self, golden: &str, options: &PrepareOptions) -> Result<Prepared, ModelError> {
        prepare(&checkpoint(golden), &self.0, options, &|_, _| ())
    }

    fn load(&self, weights: WeightFormat) -> Result<CpuBackend, ModelError> {
        CpuBackend::load(&self.0, &LoadOptions { weights, ..LoadOptions::default() }, |_, _| ())
    }

    /// Every file but the lock.
    pub(super) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let files = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap());
        files
            .map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap()))
            .filter(|(name, _)| name != "packed.lock")
            .collect()
    }

    pub(super) fn change(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.0.join(file);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        // Not over the file that may be mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }

    /// The error, with the directory's name taken out.
    pub(super) fn reported(&self, error: ModelError) -> (&'static str, String) {
        let text = error.to_string().replace(&format!("{}/", self.0.display()), "");
        (error.reason(), text.replace(&self.0.display().to_string(), "OUT"))
    }

    fn error(&self) -> (&'static str, String) {
        let loaded = self.load(WeightFormat::Native);
        self.reported(loaded.err().expect("the packed model is broken"))
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

pub(super) fn checkpoint(golden: &str) -> PathBuf {
    model("golden").join(golden)
}

pub(super) fn options(weights: WeightFormat) -> PrepareOptions {
    PrepareOptions { weights, experts: None, threads: 1, supply: None }
}

/// Everything that a model computes of a golden's tokens.
pub(super) fn computed(backend: &CpuBackend, golden: &str) -> Record {
    let (_, ids) = super::golden(&format!("golden/{golden}"));
    let mut kv = backend.allocate_kv(BlockAllocator::needed(ids.len())).unwrap();
    compute(backend, &every_row(&ids, &blocks(ids.len())), &mut kv)
}

pub(super) fn with_all_experts(backend: CpuBackend) -> CpuBackend {
    let experts = backend.config().experts() as u32;
    let layers: Vec<usize> = backend.config().moe_layers().collect();
    let all: Vec<_> = layers
        .into_iter()
        .flat_map(|layer| (0..experts).map(move |expert| ExpertId::new(layer as u32, expert)))
        .collect();
    backend.load_experts(&all, |_| ()).unwrap();
    backend
}

#[test]
fn a_packed_model_has_the_bits_and_the_fingerprint_of_its_checkpoint() {
    for golden in ["v3", "v3-fp8", "v2-lite", "qwen3-moe", "mixtral", "olmoe"] {
        for weights in FORMATS {
            let out = Out::of("bits", golden, weights);
            let expected =
                load_as(&format!("golden/{golden}"), &LoadOptions { weights, ..LoadOptions::default() });
            let packed = with_all_experts(out.load(WeightFormat::Native).unwrap());
            assert_eq!(packed.options().weights, weights);
            assert_eq!(computed(&packed, golden), computed(&expected, golden), "{golden} in {weights}");
            for numerics in Numerics::ALL {
                let fingerprint =
                    |model: &Path, weights| expertmesh_engine::fingerprint(model, weights, numerics);
                let expected = fingerprint(&checkpoint(golden), weights).unwrap();
                assert_eq!(fingerprint(&out.0, weights).unwrap(), expected);
                assert_eq!(fingerprint(&out.0, WeightFormat::Native).unwrap(), expected);
            }
        }
    }
}

const SINGLE: &str = "model.safetensors";

/// A checkpoint whose weights are elsewhere: its file has zeros, over which ranges are copied.
#[derive(Debug)]
pub(super) struct Copied {
    from: PathBuf,
    folder: Out,
    pub(super) brought: Mutex<u64>,
}

impl Copied {
    pub(super) fn new(golden: &str, test: &str) -> Self {
        let (from, folder) = (checkpoint(golden), Out::new(&format!("copied-{test}-{golden}")));
        fs::create_dir_all(&folder.0).unwrap();
        fs::copy(from.join("config.json"), folder.0.join("config.json")).unwrap();
        let mut holed = fs::read(from.join(SINGLE)).unwrap();
        let header = header(&holed);
        holed[header..].fill(0);
        fs::write(folder.0.join(SINGLE), holed).unwrap();
        Self { from, folder, brought: Mutex::new(0) }
    }

    fn write(&self, file: &Path, range: std::ops::Range<u64>, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(file).unwrap();
        file.write_all_at(bytes, range.start).unwrap();
    }
}

/// Where the tensors' bytes begin.
pub(super) fn header(file: &[u8]) -> usize {
    8 + u64::from_le_bytes(*file.first_chunk().unwrap()) as usize
}

impl Supply for Copied {
    fn identity(&self) -> String {
        "copied".into()
    }

    fn checkpoint(&self) -> Result<PathBuf, NotBrought> {
        Ok(self.folder.0.clone())
    }

    fn bring(&self, file: &Path, range: std::ops::Range<u64>) -> Result<(), NotBrought> {
        let whole = fs::read(self.from.join(file.file_name().unwrap())).unwrap();
        self.write(file, range.clone(), &whole[range.start as usize..range.end as usize]);
        *self.brought.lock().unwrap() += range.end - range.start;
        Ok(())
    }

    fn give_back(&self, file: &Path, range: std::ops::Range<u64>) {
        self.write(file, range.clone(), &vec![0; (range.end - range.start) as usize]);
    }
}

#[test]
fn weights_that_are_brought_as_they_are_packed_make_the_same_blobs_and_are_given_back() {
    for golden in ["v3-fp8", "v2", "qwen3-moe"] {
        let copied = std::sync::Arc::new(Copied::new(golden, "brought"));
        let out = Out::new(&format!("brought-{golden}"));
        let native = options(WeightFormat::Native);
        let options = PrepareOptions { supply: Some(copied.clone()), threads: 4, ..native.clone() };
        prepare(&copied.folder.0, &out.0, &options, &|_, _| ()).unwrap();
        let expected = Out::new(&format!("expected-{golden}"));
        expected.prepare(golden, &native).unwrap();
        let blobs = |out: &Out| {
            let mut files = out.files();
            files.retain(|name, _| name.ends_with(".bin"));
            files
        };
        assert!(blobs(&out) == blobs(&expected), "{golden}: the bytes differ");
        let file = copied.folder.files().remove(SINGLE).unwrap();
        let data = &file[header(&file)..];
        assert!(data.iter().all(|byte| *byte == 0), "{golden}: something was not given back");
        let brought = *copied.brought.lock().unwrap() as usize;
        assert!(brought <= data.len(), "{golden}: {brought} bytes, of {}", data.len());
    }
}

#[test]
fn a_packed_model_is_not_another_format() {
    let out = Out::of("format", "v3", WeightFormat::Int8);
    let error = out.load(WeightFormat::Bf16).err().unwrap();
    let expected =
        "packed.json: the weights are packed in int8, not in bf16: ask for int8 or native, or prepare bf16";
    assert_eq!(out.reported(error), ("InvalidPacked", expected.to_owned()));
    let error = expertmesh_engine::fingerprint(&out.0, WeightFormat::Fp8, Numerics::Pair).unwrap_err();
    assert!(error.to_string().contains("packed in int8, not in fp8"));
    let error = out.reported(Reference::open(&out.0).err().unwrap());
    let expected = "no model at OUT: it is packed; this needs the checkpoint that it was made from";
    assert_eq!(error, ("ModelNotFound", expected.to_owned()));
}

#[test]
fn a_subset_has_its_experts_names_the_others_and_grows() {
    let out = Out::new("subset");
    let some = |experts: &[u32]| PrepareOptions {
        experts: Some(experts.iter().copied().collect::<BTreeSet<_>>()),
        ..options(WeightFormat::Bf16)
    };
    let few = out.prepare("v3", &some(&[1, 2, 5])).unwrap();
    let packed = out.load(WeightFormat::Native).unwrap();
    packed.load_experts(&[ExpertId::new(1, 1), ExpertId::new(1, 2), ExpertId::new(2, 5)], |_| ()).unwrap();
    let missing = packed.load(ExpertId::new(1, 3)).unwrap_err();
    let expected = "expert 3 of layer 1 is not among those that are packed in OUT";
    assert_eq!(out.reported(missing), ("ExpertNotPacked", expected.to_owned()));
    let config = ModelConfig::read(&out.0).unwrap();
    let held = PackedModel::open(&out.0, &config).unwrap().unwrap().experts();
    assert_eq!(held, config.moe_layers().map(|layer| (layer, vec![1, 2, 5])).collect());

    let more = out.prepare("v3", &some(&[0])).unwrap();
    assert_eq!(more.kept, few.bytes);
    let all = out.prepare("v3", &options(WeightFormat::Bf16)).unwrap();
    assert_eq!((all.kept, all.bytes), (more.bytes, out.files_bytes()));
    assert_eq!(out.files(), Out::of("subset-whole", "v3", WeightFormat::Bf16).files());
    // The one that was mapped before it grew.
    packed.load_experts(&[ExpertId::new(1, 5)], |_| ()).unwrap();
    let whole = with_all_experts(out.load(WeightFormat::Native).unwrap());
    assert_eq!(computed(&whole, "v3"), computed(&load("golden/v3"), "v3"));

    let error = out.prepare("v3", &some(&[99])).unwrap_err();
    assert_eq!(error.to_string(), "the model has no expert 99 in layer 1");
}

impl Out {
    fn files_bytes(&self) -> u64 {
        let config = ModelConfig::read(&self.0).unwrap();
        PackedModel::open(&self.0, &config).unwrap().unwrap().bytes()
    }
}

#[test]
fn an_expert_that_was_evicted_comes_back_with_the_same_bits() {
    let out = Out::of("evicted", "v3", WeightFormat::Int4);
    let backend = with_all_experts(out.load(WeightFormat::Native).unwrap());
    let before = computed(&backend, "v3");
    (0..backend.config().experts() as u32).for_each(|expert| backend.evict(ExpertId::new(1, expert)));
    assert!(!backend.is_resident(ExpertId::new(1, 0)));
    assert_eq!(computed(&with_all_experts(backend), "v3"), before);
}

/// Not a test of its own: the one below runs it in a process that it kills.
#[test]
fn prepare_until_killed() {
    let Ok(out) = std::env::var("EXPERTMESH_TEST_PREPARE") else { return };
    let after: u64 = std::env::var("EXPERTMESH_TEST_BYTES").unwrap().parse().unwrap();
    let killed = |done, _| {
        if done >= after {
            // SIGKILL's effect: nothing is flushed, nothing is dropped.
            std::process::abort();
        }
    };
    prepare(&checkpoint("v3"), Path::new(&out), &options(WeightFormat::Int8), &killed).unwrap();
}

#[test]
fn prepare_goes_on_wherever_it_was_killed() {
    let whole = Out::of("killed-whole", "v3", WeightFormat::Int8);
    let total = whole.files_bytes();
    let out = Out::new("killed");
    for tenth in [0, 1, 5, 9, 10] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["packed::prepare_until_killed", "--exact"])
            .env("EXPERTMESH_TEST_PREPARE", &out.0)
            .env("EXPERTMESH_TEST_BYTES", (total * tenth / 10).to_string())
            .output()
            .unwrap()
            .status;
        assert!(!status.success());
        let unfinished = "OUT: prepare was not finished here; run it again".to_owned();
        assert_eq!(out.error(), ("InvalidPacked", unfinished));
    }
    let prepared = out.prepare("v3", &options(WeightFormat::Int8)).unwrap();
    assert_eq!(prepared.bytes, total);
    // The last one died with everything written but its last line.
    assert!(prepared.kept >= total * 8 / 10, "{prepared:?} of {total}");
    assert_eq!(out.files(), whole.files());
}

#[test]
fn prepare_repairs_what_is_not_whole_and_keeps_the_rest() {
    let out = Out::of("repaired", "v3", WeightFormat::Int8);
    let (whole, total) = (out.files(), out.files_bytes());
    let expert = Layout::Cpu1.expert_bytes(&ModelConfig::read(&out.0).unwrap(), WeightFormat::Int8);
    let damages: [&dyn Fn(); 5] = [
        &|| out.change("layer-001.bin", |bytes| bytes[5] ^= 1),
        &|| out.change("layer-002.bin", |bytes| bytes.truncate(100)),
        &|| out.change("dense.bin", |bytes| bytes.fill(0)),
        &|| fs::remove_file(out.0.join("layer-002.bin")).unwrap(),
        &|| fs::write(out.0.join("packed.json.partial"), "{").unwrap(),
    ];
    let lost = damages.map(|damage| {
        damage();
        let prepared = out.prepare("v3", &options(WeightFormat::Int8)).unwrap();
        assert_eq!(out.files(), whole);
        total - prepared.kept
    });
    let experts = expert * ModelConfig::read(&out.0).unwrap().experts() as u64;
    assert_eq!((lost[0], lost[1], lost[3], lost[4]), (expert, experts, experts, 0));
}

#[test]
fn a_journal_that_was_cut_costs_what_its_lines_said() {
    let out = Out::of("journal", "v3", WeightFormat::Int8);
    let whole = out.files();
    let index: serde_json::Value = serde_json::from_slice(&whole["packed.json"]).unwrap();
    let identity = serde_json::json!({
        "layout": index["layout"], "weights": index["weights"], "checkpoint": index["checkpoint"],
    });
    let first = &index["blobs"][0];
    let line = format!("[null,null,{}]", first["crc32c"]);
    let bytes = first["bytes"].as_u64().unwrap();
    let journals = [
        (format!("{identity}\n{line}\n"), bytes),
        (format!("{identity}\n{line}"), bytes),
        (format!("{identity}\n{line}\n[1,2,3"), bytes),
        (format!("{identity}\n[null,null,7]\n"), 0),
        (format!("{identity}\n[900,null,7]\n[1,1]\n"), 0),
        (identity.to_string(), 0),
        ("{\"layout\":".to_owned(), 0),
        (String::new(), 0),
    ];
    for (journal, kept) in journals {
        fs::remove_file(out.0.join("packed.json")).unwrap();
        fs::write(out.0.join("packed.journal"), &journal).unwrap();
        let prepared = out.prepare("v3", &options(WeightFormat::Int8)).unwrap();
        assert_eq!(prepared.kept, kept, "{journal}");
        assert_eq!(out.files(), whole);
    }
}

#[test]
fn prepare_leaves_what_is_not_its_own() {
    let out = Out::of("refused", "v3", WeightFormat::Int8);
    let refused = |golden: &str, weights| {
        let (reason, problem) = out.reported(out.prepare(golden, &options(weights)).unwrap_err());
        assert_eq!(reason, "PrepareFailed");
        problem
    };
    let whole = out.files();
    let other = "OUT: it holds another packed model: ";
    assert_eq!(refused("v3", WeightFormat::Int4), format!("{other}format int8, not int4"));
    assert!(refused("v2", WeightFormat::Int8).starts_with(&format!("{other}architecture ")));
    assert_eq!(out.files(), whole);

    fs::remove_file(out.0.join("packed.json")).unwrap();
    for name in whole.keys().filter(|name| *name != "dense.bin" && *name != "packed.json") {
        fs::remove_file(out.0.join(name)).unwrap();
    }
    let foreign = "OUT: it holds dense.bin and no packed model; an empty or a new directory is needed";
    assert_eq!(refused("v3", WeightFormat::Int8), foreign);
}

#[test]
fn one_process_at_a_time_prepares_a_directory() {
    let out = Out::new("locked");
    let second = Mutex::new(None);
    let meanwhile = |_, _| {
        let refused = || out.reported(out.prepare("v3", &options(WeightFormat::Int8)).unwrap_err());
        second.lock().unwrap().get_or_insert_with(refused);
    };
    prepare(&checkpoint("v3"), &out.0, &options(WeightFormat::Int8), &meanwhile).unwrap();
    let expected = ("PrepareFailed", "OUT: another process prepares it now".to_owned());
    assert_eq!(second.into_inner().unwrap(), Some(expected));
    out.prepare("v3", &options(WeightFormat::Int8)).unwrap();
}

#[test]
fn broken_packed_models_name_the_file_and_the_blob() {
    let out = Out::of("broken", "v3", WeightFormat::Bf16);
    let (whole, bytes) =
        (out.files(), Layout::Cpu1.expert_bytes(&ModelConfig::read(&out.0).unwrap(), WeightFormat::Bf16));
    let restore = || {
        for (name, bytes) in &whole {
            fs::remove_file(out.0.join(name)).ok();
            fs::write(out.0.join(name), bytes).unwrap();
        }
    };
    let broken = |break_it: &dyn Fn()| {
        break_it();
        let (reason, problem) = out.error();
        assert_eq!(reason, "InvalidPacked");
        restore();
        problem
    };

    let problem = broken(&|| out.change("dense.bin", |bytes| bytes[70] ^= 0x40));
    assert!(problem.starts_with("dense.bin: embeddings and head at 0: its CRC-32C is "), "{problem}");
    let problem = broken(&|| out.change("layer-001.bin", |bytes| bytes.truncate(4096)));
    assert_eq!(problem, format!("layer-001.bin: expert 0 of layer 1 ends at {bytes}, the file at 4096"));
    let problem = broken(&|| fs::remove_file(out.0.join("layer-002.bin")).unwrap());
    assert!(problem.starts_with("layer-002.bin: expert 0 of layer 2: no such file"), "{problem}");
    let problem = broken(&|| fs::write(out.0.join("packed.json"), "{}").unwrap());
    assert_eq!(problem, "packed.json: missing field `bytes` at line 1 column 2");
    let problem = broken(&|| {
        fs::copy(checkpoint("v2").join("config.json"), out.0.join("config.json")).map(drop).unwrap()
    });
    assert!(!problem.is_empty());

    // Only what is used is read: a damaged expert is found when it is loaded.
    out.change("layer-001.bin", |bytes| *bytes.last_mut().unwrap() ^= 1);
    let backend = out.load(WeightFormat::Native).unwrap();
    let last = backend.config().experts() as u32 - 1;
    backend.load(ExpertId::new(1, 0)).unwrap();
    let (reason, problem) = out.reported(backend.load(ExpertId::new(1, last)).unwrap_err());
    assert_eq!(reason, "InvalidPacked");
    assert!(problem.starts_with(&format!("layer-001.bin: expert {last} of layer 1 at ")), "{problem}");
    assert!(!backend.is_resident(ExpertId::new(1, last)));
    let config = ModelConfig::read(&out.0).unwrap();
    let errors = PackedModel::open(&out.0, &config).unwrap().unwrap().check(|_, _| ());
    assert_eq!(errors.len(), 1);
}

/// Where it is set, this test's process is the child whose file is cut.
const CUT: &str = "EXPERTMESH_TEST_CUT";

#[test]
fn a_file_that_is_cut_while_it_is_mapped_is_an_error_or_the_end_with_its_name() {
    if let Some(directory) = std::env::var_os(CUT) {
        let out = std::mem::ManuallyDrop::new(Out(directory.into()));
        let backend = with_all_experts(out.load(WeightFormat::Native).unwrap());
        expertmesh_engine::tell_lost_weights(&out.0.join("last-words"));
        let other = out.load(WeightFormat::Native).unwrap();
        let cut = |file| fs::File::options().write(true).open(out.0.join(file)).unwrap().set_len(0).unwrap();
        cut("layer-001.bin");
        let (reason, problem) = out.reported(other.load(ExpertId::new(1, 1)).unwrap_err());
        assert_eq!(reason, "InvalidPacked");
        assert!(
            problem.starts_with("layer-001.bin: expert 1 of layer 1 at ")
                && problem.contains("cut while it was in use")
        );
        println!("an error first");
        cut("dense.bin");
        computed(&backend, "v2-lite");
        unreachable!("its weights are gone");
    }
    let out = Out::of("cut", "v2-lite", WeightFormat::Int8);
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([
        "--nocapture",
        "--exact",
        "packed::a_file_that_is_cut_while_it_is_mapped_is_an_error_or_the_end_with_its_name",
    ]);
    let ended = child.env(CUT, &out.0).output().unwrap();
    let [said, told] = [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(said.contains("an error first"), "{said}{told}");
    assert_eq!(ended.status.code(), Some(1), "{said}{told}");
    let words = format!(
        "{}: the file was cut while it was in use; start again with the whole file\n",
        out.0.join("dense.bin").display()
    );
    assert!(told.ends_with(&format!("expertmesh-worker: {words}")), "{told}");
    assert_eq!(fs::read_to_string(out.0.join("last-words")).unwrap(), format!("WeightsLost: {words}"));
}

#[test]
fn the_layout_is_the_one_that_its_id_names() {
    // Where this fails, packed models of the last release would be misread: give Layout a new id (worker/model/src/layout/budget.rs), then note
    // the new sums.
    let sums = FORMATS.map(|weights| {
        let index = &Out::of("layout", "v3", weights).files()["packed.json"];
        let index: serde_json::Value = serde_json::from_slice(index).unwrap();
        let blobs = index["blobs"].as_array().unwrap();
        let sum = blobs.iter().fold(0u64, |sum, blob| sum.rotate_left(7) ^ blob["crc32c"].as_u64().unwrap());
        (index["layout"].as_str().unwrap().to_owned(), sum)
    });
    assert_eq!(
        sums.map(|(layout, sum)| format!("{layout} {sum:016x}")),
        [
            "cpu-1 54dd2262fcf984e3",
            "cpu-1 0e8807f5906b9491",
            "cpu-1 760017a960c0601b",
            "cpu-1 0fa189735e922de6",
        ]
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn a_damaged_index_is_an_error_or_another_one(damage in damage()) {
        let out = Out::of("index", "olmoe", WeightFormat::Int4);
        out.change("packed.json", |bytes| damage.inflict(bytes));
        if let Err(error) = out.load(WeightFormat::Native) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
