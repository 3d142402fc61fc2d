//! Packed models that grow: packed where they are asked for, once, whoever asks, and whole again after damage.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use expertmesh_engine::{
    Backend, Cache, CpuBackend, ExpertStore, LoadOptions, NotBrought, Origin, PrepareOptions, Siblings, Sink,
    Supply, fingerprint_of, prepare,
};
use expertmesh_model::config::model::ModelConfig;
use expertmesh_model::error::ModelError;
use expertmesh_model::expert::ExpertId;
use expertmesh_model::format::WeightFormat;
use expertmesh_model::layout::budget::Layout;
use expertmesh_model::layout::plan::Place;
use expertmesh_model::numerics::Numerics;

use super::packed::{Copied, Out, checkpoint, computed, header, options, with_all_experts};

const GOLDEN: &str = "v3-fp8";
const FORMAT: WeightFormat = WeightFormat::Int8;

/// What caches were told.
type Told = Arc<Mutex<Vec<String>>>;

fn open(out: &Out, supply: Arc<dyn Supply>, told: &Told) -> Result<Cache, ModelError> {
    let model = checkpoint(GOLDEN);
    let fingerprint = fingerprint_of(supply.identity(), &model, FORMAT, Numerics::default()).unwrap();
    let told = told.clone();
    let tell = Box::new(move |text: &str| told.lock().unwrap().push(text.to_owned()));
    Cache::open(&model, &out.0, fingerprint, Origin::Supply(supply), tell)
}

fn load(out: &Out, supply: Arc<dyn Supply>, told: &Told) -> Result<CpuBackend, ModelError> {
    CpuBackend::cached(Arc::new(open(out, supply, told)?), &LoadOptions::default(), |_, _| ())
}

fn all_experts() -> Vec<ExpertId> {
    let config = ModelConfig::read(&checkpoint(GOLDEN)).unwrap();
    let of = |layer| (0..config.experts() as u32).map(move |expert| ExpertId::new(layer as u32, expert));
    config.moe_layers().flat_map(of).collect()
}

/// What `prepare` makes of the checkpoint.
fn expected() -> BTreeMap<String, Vec<u8>> {
    let out = Out::new(&format!("cache-expected-{:?}", std::thread::current().id()));
    prepare(&checkpoint(GOLDEN), &out.0, &options(FORMAT), &|_, _| ()).unwrap();
    blobs(&out)
}

fn blobs(out: &Out) -> BTreeMap<String, Vec<u8>> {
    let mut files = out.files();
    files.retain(|name, _| name.ends_with(".bin"));
    files
}

/// A source that is gone.
#[derive(Debug)]
struct Gone;

impl Supply for Gone {
    fn identity(&self) -> String {
        "copied".into()
    }

    fn checkpoint(&self) -> Result<PathBuf, NotBrought> {
        Err(NotBrought { reason: "SourceUnreachable", problem: "gone".into() })
    }

    fn bring(&self, _: &Path, _: Range<u64>) -> Result<(), NotBrought> {
        unreachable!("it has no checkpoint")
    }

    fn give_back(&self, _: &Path, _: Range<u64>) {}
}

#[test]
fn a_blob_is_packed_once_whoever_asks_and_needs_no_source_ever_after() {
    let (out, told) = (Out::new("cache-together"), Told::default());
    let copies = ["one", "two"].map(|name| Arc::new(Copied::new(GOLDEN, &format!("together-{name}"))));
    let backends = std::thread::scope(|scope| {
        let both = copies.each_ref().map(|copied| {
            scope.spawn(|| {
                let backend = load(&out, copied.clone(), &told).unwrap();
                backend.fill(&all_experts(), &|_| ()).unwrap();
                with_all_experts(backend)
            })
        });
        both.map(|thread| thread.join().unwrap())
    });
    let data = fs::metadata(checkpoint(GOLDEN).join("model.safetensors")).unwrap().len() as usize;
    let file = fs::read(checkpoint(GOLDEN).join("model.safetensors")).unwrap();
    let brought: u64 = copies.iter().map(|copied| *copied.brought.lock().unwrap()).sum();
    assert!(brought as usize <= data - header(&file), "{brought} bytes, of {data}");
    assert!(blobs(&out) == expected(), "the bytes differ");

    let offline = with_all_experts(load(&out, Arc::new(Gone), &told).unwrap());
    let tokens = computed(&offline, GOLDEN);
    backends.iter().for_each(|backend| assert_eq!(computed(backend, GOLDEN), tokens));
    assert_eq!(*told.lock().unwrap(), [""; 0]);
}

#[test]
fn what_is_not_there_is_the_sources_error_and_comes_once_it_is_back() {
    let (out, told) = (Out::new("cache-gone"), Told::default());
    let error = load(&out, Arc::new(Gone), &told).err().unwrap();
    assert_eq!(error.reason(), "SourceUnreachable");
    let backend = load(&out, Arc::new(Copied::new(GOLDEN, "gone")), &told).unwrap();
    let expert = all_experts()[0];
    backend.load(expert).unwrap();
    let offline = load(&out, Arc::new(Gone), &told).unwrap();
    offline.load(expert).unwrap();
    assert_eq!(offline.load(all_experts()[1]).unwrap_err().reason(), "SourceUnreachable");
    backend.load(all_experts()[1]).unwrap();
    offline.load(all_experts()[1]).unwrap();
}

#[test]
fn a_blob_that_is_damaged_is_packed_again_and_told() {
    let (out, told) = (Out::new("cache-damaged"), Told::default());
    let backend = load(&out, Arc::new(Copied::new(GOLDEN, "damaged")), &told).unwrap();
    backend.fill(&all_experts(), &|_| ()).unwrap();
    drop(backend);
    for file in ["dense.bin", "layer-002.bin"] {
        out.change(file, |bytes| bytes[100] ^= 1);
    }
    let backend = load(&out, Arc::new(Copied::new(GOLDEN, "damaged")), &told).unwrap();
    with_all_experts(backend);
    assert!(blobs(&out) == expected(), "the damage stays");
    let told = told.lock().unwrap();
    let of =
        |file: &str| told.iter().filter(|text| text.contains(file) && text.contains("is damaged")).count();
    assert_eq!((told.len(), of("dense.bin"), of("layer-002.bin")), (2, 1, 1), "{told:?}");
}

#[test]
fn what_the_journal_does_not_say_any_more_is_packed_again() {
    let (out, told) = (Out::new("cache-journal"), Told::default());
    let load = || with_all_experts(load(&out, Arc::new(Copied::new(GOLDEN, "journal")), &told).unwrap());
    load();
    let journal = out.files().remove("packed.journal").unwrap();
    for length in [journal.len() - 1, journal.len() / 2, journal.len() / 3, 10, 0] {
        out.change("packed.journal", |bytes| bytes.truncate(length));
        load();
        assert!(blobs(&out) == expected(), "{length}");
    }
}

#[test]
fn prepare_waits_for_nobody_and_makes_a_model_of_what_a_cache_has() {
    let (out, told) = (Out::new("cache-prepared"), Told::default());
    let copied = Arc::new(Copied::new(GOLDEN, "prepared"));
    let cache = open(&out, copied.clone(), &told).unwrap();
    let options = PrepareOptions { supply: Some(copied.clone()), ..options(FORMAT) };
    let error = prepare(&checkpoint(GOLDEN), &out.0, &options, &|_, _| ()).unwrap_err();
    assert_eq!(out.reported(error).1, "OUT: another process uses it as a cache");
    let backend = CpuBackend::cached(Arc::new(cache), &LoadOptions::default(), |_, _| ()).unwrap();
    let bytes = Layout::Cpu1.dense_bytes(backend.config(), FORMAT);
    drop(backend);
    let prepared = prepare(&checkpoint(GOLDEN), &out.0, &options, &|_, _| ()).unwrap();
    assert_eq!(prepared.kept, bytes);
    assert!(blobs(&out) == expected());
    with_all_experts(load(&out, Arc::new(Gone), &told).unwrap());
}

/// Another cache, some of whose blobs are not given, or damaged on their way.
struct Sibling {
    cache: Cache,
    /// Which they are, and how often it was asked.
    gives: fn(Place) -> Gives,
    asked: AtomicUsize,
}

#[derive(PartialEq)]
enum Gives {
    All,
    Nothing,
    /// The last byte is another.
    Damaged,
    /// It ends before the last byte.
    Half,
}

impl Siblings for Sibling {
    fn fetch(&self, place: Place, sink: &mut dyn Sink) -> std::io::Result<Option<u32>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let held = self.cache.offer(place).unwrap().unwrap();
        let mut bytes = held.bytes().to_vec();
        sink.begin();
        sink.take(&bytes[..bytes.len() / 3])?; // by one that breaks off
        sink.begin();
        match (self.gives)(place) {
            Gives::All => {}
            Gives::Nothing => return Ok(None),
            Gives::Damaged => *bytes.last_mut().unwrap() ^= 1,
            Gives::Half => bytes.truncate(bytes.len() / 2),
        }
        bytes.chunks(1000).try_for_each(|part| sink.take(part))?;
        Ok(Some(held.crc32c()))
    }
}

#[test]
fn what_a_sibling_has_is_not_drawn_again_and_what_it_gives_wrong_is() {
    let told = Told::default();
    let (theirs, ours) = (Out::new("cache-theirs"), Out::new("cache-ours"));
    let gives = |place| match place {
        Place::Expert(_, 0) => Gives::Nothing,
        Place::Expert(_, 1) => Gives::Damaged,
        Place::Expert(_, 2) => Gives::Half,
        _ => Gives::All,
    };
    let cache = open(&theirs, Arc::new(Copied::new(GOLDEN, "theirs")), &told).unwrap();
    let sibling = Arc::new(Sibling { cache, gives, asked: AtomicUsize::new(0) });
    let copied = Arc::new(Copied::new(GOLDEN, "ours"));
    let cache = Arc::new(open(&ours, copied.clone(), &told).unwrap());
    cache.ask(sibling.clone());
    let backend = CpuBackend::cached(cache.clone(), &LoadOptions::default(), |_, _| ()).unwrap();
    assert_eq!(*copied.brought.lock().unwrap(), 0, "the dense part was drawn");
    backend.fill(&all_experts(), &|_| ()).unwrap();
    let brought = *copied.brought.lock().unwrap();
    let all = fs::metadata(checkpoint(GOLDEN).join("model.safetensors")).unwrap().len();
    assert!(0 < brought && brought < all / 2, "{brought} of {all} bytes");
    assert!(blobs(&ours) == expected(), "the bytes differ");
    let asked = sibling.asked.load(Ordering::SeqCst);
    with_all_experts(backend);
    assert_eq!(sibling.asked.load(Ordering::SeqCst), asked, "what is here is not asked for");
    assert!(cache.has_dense());
}
