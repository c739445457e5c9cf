//! A folder of manifests: the source that needs no cluster.
//!
//! Read are the files `*.yaml`, `*.yml` and `*.json` directly in the folder, in the order of their names; files that begin
//! with a dot are left out. A mounted ConfigMap works: its links are followed.
//!
//! A broken manifest never takes a working Service away. Where a whole document or file cannot be used, all objects that
//! its file defined when it was last good are kept; an object goes when its file goes, or when the document goes from a
//! file that is well-formed. Still, a file should appear at once: write it under another name (`.web.yaml.new`) and rename
//! it. A file that is cut off between two documents is well-formed. And what was last good is known to this process only: a
//! file that is already broken when the agent starts has nothing to be kept.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::model::{EndpointSlice, ObjectName, Origin, Problem, Service};

mod document;
mod watch;

pub use watch::Watcher;

/// Files beyond this size are refused: the largest legal set of objects is far smaller.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// What a folder holds at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Whether the folder could be read at least once. Without that, nothing is known: an empty snapshot does not mean
    /// that the objects of an earlier process are gone.
    pub complete: bool,
    /// The Services, each name once.
    pub services: Vec<Service>,
    /// The slices, each name once.
    pub slices: Vec<EndpointSlice>,
    /// What could not be taken as it is written, in the order of the files.
    pub problems: Vec<Problem>,
}

/// Reads a folder once, with nothing to fall back on.
#[must_use]
pub fn read_folder(dir: &Path) -> Snapshot {
    Folder::new(dir).read()
}

/// A folder that is read again and again, and what is known of its files.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    files: BTreeMap<OsString, File>,
    complete: bool,
    /// Device, inode and birth of the directory that the files were read from: an inode alone is soon used again.
    directory: Option<(u64, u64, Option<SystemTime>)>,
}

/// What is known of one file.
#[derive(Debug, Default)]
struct File {
    /// Hash of the contents that were parsed: an unchanged file is not parsed again. None if it could not be read.
    contents: Option<u64>,
    /// The objects that it defines now.
    fresh: Vec<Object>,
    /// The objects that it defined when it was last good, unless they are among the fresh ones.
    kept: Vec<Object>,
    problems: Vec<Problem>,
}

/// An object and where it was defined.
#[derive(Debug, Clone)]
struct Object {
    origin: Origin,
    value: Value,
}

#[derive(Debug, Clone)]
enum Value {
    Service(Service),
    Slice(EndpointSlice),
}

/// Kind and name: what must be unique in a folder.
type Key = (&'static str, ObjectName);

impl Object {
    fn key(&self) -> Key {
        match &self.value {
            Value::Service(service) => ("Service", service.name.clone()),
            Value::Slice(slice) => ("EndpointSlice", slice.name.clone()),
        }
    }
}

impl Folder {
    /// A folder of which nothing is known yet. It need not exist.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), files: BTreeMap::new(), complete: false, directory: None }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads what has changed and returns what the folder holds now.
    #[must_use]
    pub fn read(&mut self) -> Snapshot {
        let unreadable = match self.names() {
            Ok(names) => {
                self.complete = true;
                self.read_files(names);
                None
            }
            Err(error) => {
                let kept: usize = self.files.values().map(|file| file.fresh.len() + file.kept.len()).sum();
                let origin = Origin::File { path: self.dir.as_path().into(), line: 0 };
                let message = format!("cannot read the folder: {error}; keeping the {kept} objects known from it");
                Some(Problem::of(origin, message))
            }
        };
        let mut snapshot = self.snapshot();
        snapshot.problems.extend(unreadable);
        snapshot
    }

    fn names(&mut self) -> io::Result<BTreeSet<OsString>> {
        let metadata = fs::metadata(&self.dir)?;
        let directory = Some((metadata.dev(), metadata.ino(), metadata.created().ok()));
        let names = manifest_names(&self.dir)?;
        if names.is_empty() && !self.files.is_empty() && directory != self.directory {
            // Made anew, and about to be filled; or a volume went from over it.
            return Err(io::Error::other("it is another one than before, and empty"));
        }
        self.directory = directory;
        Ok(names)
    }

    fn read_files(&mut self, names: BTreeSet<OsString>) {
        self.files.retain(|name, _| names.contains(name));
        for name in names {
            let path = self.dir.join(&name);
            let file = self.files.entry(name).or_default();
            match read_text(&path) {
                // A shell that redirects into a file empties it first.
                Ok(text) if text.trim().is_empty() && file.has_objects() => {
                    file.fail(&path, "is empty; delete the file to remove its objects".into());
                }
                Ok(text) => file.update(&path, &text),
                Err(message) => file.fail(&path, message),
            }
        }
    }

    /// Puts the objects of all files together. Of two with one name the first counts, and a kept one never replaces one
    /// that is really there, so that an object can move to another file while its old file is broken.
    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot { complete: self.complete, ..Snapshot::default() };
        let mut taken: BTreeMap<Key, &Origin> = BTreeMap::new();
        for file in self.files.values() {
            snapshot.problems.extend(file.problems.iter().cloned());
            for object in &file.fresh {
                let key = object.key();
                let object_name = format!("{} {}", key.0, key.1);
                match taken.entry(key) {
                    Entry::Vacant(entry) => {
                        entry.insert(&object.origin);
                        snapshot.add(&object.value);
                    }
                    Entry::Occupied(first) => snapshot.problems.push(Problem {
                        origin: object.origin.clone(),
                        object: object_name,
                        field: String::new(),
                        message: format!("is defined in {} already; delete one of them", first.get()),
                    }),
                }
            }
        }
        for object in self.files.values().flat_map(|file| &file.kept) {
            if let Entry::Vacant(entry) = taken.entry(object.key()) {
                entry.insert(&object.origin);
                snapshot.add(&object.value);
            }
        }
        snapshot
    }
}

impl Snapshot {
    fn add(&mut self, value: &Value) {
        match value {
            Value::Service(service) => self.services.push(service.clone()),
            Value::Slice(slice) => self.slices.push(slice.clone()),
        }
    }
}

impl File {
    /// Takes over new contents.
    fn update(&mut self, path: &Path, text: &str) {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let contents = Some(hasher.finish());
        if self.contents == contents {
            return;
        }
        let parsed = document::parse_file(path, text);
        let mut known = std::mem::take(&mut self.fresh);
        known.append(&mut self.kept);
        *self = Self { contents, fresh: parsed.objects, kept: Vec::new(), problems: parsed.problems };
        if let Some(failure) = parsed.failure {
            let mut keys = parsed.ignored;
            keys.extend(self.fresh.iter().map(Object::key));
            known.retain(|object| !keys.contains(&object.key()));
            self.kept = known;
            self.tell_kept(failure);
        }
    }

    fn has_objects(&self) -> bool {
        !self.fresh.is_empty() || !self.kept.is_empty()
    }

    /// The file cannot be read.
    fn fail(&mut self, path: &Path, message: String) {
        self.contents = None;
        self.kept.append(&mut self.fresh);
        self.problems = vec![Problem::of(Origin::File { path: path.into(), line: 0 }, message)];
        self.tell_kept(0);
    }

    fn tell_kept(&mut self, problem: usize) {
        if !self.kept.is_empty() {
            let note = format!("; keeping the last good version of {} objects from this file", self.kept.len());
            self.problems[problem].message.push_str(&note);
        }
    }
}

/// Names of the manifests in a folder.
fn manifest_names(dir: &Path) -> io::Result<BTreeSet<OsString>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let extension = Path::new(&name).extension().and_then(|extension| extension.to_str());
        let hidden = name.as_encoded_bytes().first() == Some(&b'.');
        if !hidden && matches!(extension, Some("yaml" | "yml" | "json")) {
            names.insert(name);
        }
    }
    Ok(names)
}

/// The text of a file, or what is wrong with it.
fn read_text(path: &Path) -> Result<String, String> {
    let unreadable = |error: io::Error| format!("cannot be read: {error}");
    // Asked before opening: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("is not a file; move it out of this folder".into());
    }
    let mut bytes = Vec::new();
    fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("is larger than {} MiB; split it", MAX_FILE_BYTES >> 20));
    }
    String::from_utf8(bytes).map_err(|error| {
        let position = error.utf8_error().valid_up_to();
        format!("is not UTF-8 text from byte {position} on; save it as UTF-8")
    })
}

#[cfg(test)]
mod tests;
