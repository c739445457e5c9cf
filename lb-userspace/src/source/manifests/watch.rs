//! Tells when a folder of manifests is worth reading again.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

/// A change is told when none has followed it for this long: editors and copies make several.
const QUIET: Duration = Duration::from_millis(20);
/// A change is told after this long even if others follow without a pause.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often to look whether the folder is still the one that is watched.
const CHECK: Duration = Duration::from_secs(1);
/// How often the folder is read without any sign of change: the net under lost events and links to other folders.
const REREAD: Duration = Duration::from_secs(30);

/// Watches a folder, which may come and go.
#[derive(Debug)]
pub struct Watcher {
    dir: PathBuf,
    events: mpsc::Receiver<()>,
    sender: mpsc::Sender<()>,
    watch: Option<Watch>,
    /// Change that is not told yet: when it began, and when the last event came.
    pending: Option<(Instant, Instant)>,
    next_check: Instant,
    next_reread: Instant,
    /// Watching has failed, and was told.
    failed: bool,
}

/// A watch lives on a directory, not on its path.
#[derive(Debug)]
struct Watch {
    /// Device and inode: tell whether the path still leads there.
    directory: (u64, u64),
    /// The directory is gone. Another one may have its numbers.
    lost: Arc<AtomicBool>,
    _watcher: RecommendedWatcher,
}

impl Watcher {
    /// Watches from now on. Watch first and read then, or a change in between is lost until the next regular reading.
    /// The folder need not exist. Call it within a tokio runtime.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        // One place is enough: what is told is that there was an event, not which.
        let (sender, events) = mpsc::channel(1);
        let now = Instant::now();
        let mut watcher = Self {
            dir: dir.into(),
            events,
            sender,
            watch: None,
            pending: None,
            next_check: now,
            next_reread: now + REREAD,
            failed: false,
        };
        watcher.check();
        watcher.pending = None;
        watcher
    }

    /// Waits until the folder should be read again. Can be dropped and called again without losing a change.
    pub async fn changed(&mut self) {
        loop {
            let due = self.pending.map_or(self.next_reread, |(first, last)| (last + QUIET).min(first + PATIENCE));
            tokio::select! {
                Some(()) = self.events.recv() => self.note(),
                () = sleep_until(due.min(self.next_check)) => {}
            }
            let now = Instant::now();
            if now >= self.next_check {
                self.check();
            }
            if now >= due {
                self.pending = None;
                self.next_reread = now + REREAD;
                return;
            }
        }
    }

    fn note(&mut self) {
        let now = Instant::now();
        let first = self.pending.map_or(now, |(first, _)| first);
        self.pending = Some((first, now));
    }

    /// Follows the path to another directory if it leads to one now.
    fn check(&mut self) {
        self.next_check = Instant::now() + CHECK;
        let directory = fs::metadata(&self.dir).map(|metadata| (metadata.dev(), metadata.ino())).ok();
        let watched = self.watch.as_ref().filter(|watch| !watch.lost.load(Ordering::Relaxed));
        if directory == watched.map(|watch| watch.directory) {
            return;
        }
        self.watch = None;
        self.note();
        let Some(directory) = directory else {
            debug!(folder = %self.dir.display(), "the folder is gone; waiting for it");
            return;
        };
        let lost = Arc::new(AtomicBool::new(false));
        match watch(&self.dir, self.sender.clone(), lost.clone()) {
            Ok(watcher) => self.watch = Some(Watch { directory, lost, _watcher: watcher }),
            Err(error) if !self.failed => {
                self.failed = true;
                let period = CHECK.as_secs();
                warn!(folder = %self.dir.display(), "cannot watch the folder: {error}; reading it every {period} s");
            }
            Err(_) => {}
        }
    }
}

fn watch(dir: &Path, sender: mpsc::Sender<()>, lost: Arc<AtomicBool>) -> notify::Result<RecommendedWatcher> {
    let path = dir.to_path_buf();
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if let Ok(event) = &event {
            match event.kind {
                // Reading the folder makes events too; to follow these would be to read it for ever.
                EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write) => return,
                EventKind::Remove(_) if event.paths.contains(&path) => lost.store(true, Ordering::Relaxed),
                _ => {}
            }
        }
        // A full channel holds the news already.
        let _ = sender.try_send(());
    })?;
    watcher.watch(dir, RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    async fn expect_change(watcher: &mut Watcher, what: &str) {
        assert!(timeout(Duration::from_secs(4), watcher.changed()).await.is_ok(), "no change was told: {what}");
    }

    /// Waits until late events are told too.
    async fn settle(watcher: &mut Watcher) {
        while timeout(Duration::from_millis(300), watcher.changed()).await.is_ok() {}
    }

    async fn expect_silence(watcher: &mut Watcher, what: &str) {
        assert!(timeout(Duration::from_millis(1500), watcher.changed()).await.is_err(), "a change was told: {what}");
    }

    #[test]
    fn writing_and_removing_are_changes_and_reading_is_none() {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("web.yaml");
            fs::write(&file, "a").unwrap();
            let mut watcher = Watcher::new(dir.path());
            fs::write(&file, "b").unwrap();
            fs::write(&file, "c").unwrap();
            expect_change(&mut watcher, "a file was written").await;
            settle(&mut watcher).await;
            fs::read(&file).unwrap();
            fs::read_dir(dir.path()).unwrap().for_each(drop);
            expect_silence(&mut watcher, "a file was read").await;
            fs::remove_file(&file).unwrap();
            expect_change(&mut watcher, "a file was removed").await;
        });
    }

    #[test]
    fn a_folder_that_is_removed_and_created_again_is_watched_again() {
        run(async {
            let parent = tempfile::tempdir().unwrap();
            let dir = parent.path().join("manifests");
            let mut watcher = Watcher::new(&dir);
            expect_silence(&mut watcher, "there is no folder").await;
            for round in 0..3 {
                fs::create_dir(&dir).unwrap();
                expect_change(&mut watcher, "the folder was created").await;
                fs::write(dir.join("web.yaml"), "a").unwrap();
                expect_change(&mut watcher, "a file was written").await;
                fs::remove_dir_all(&dir).unwrap();
                if round == 1 {
                    // At once, and perhaps under the same number.
                    fs::create_dir(&dir).unwrap();
                    expect_change(&mut watcher, "the folder was replaced").await;
                    tokio::time::sleep(CHECK).await;
                    let _ = timeout(CHECK * 2, watcher.changed()).await;
                    fs::write(dir.join("web.yaml"), "b").unwrap();
                    expect_change(&mut watcher, "a file was written into the new folder").await;
                    fs::remove_dir_all(&dir).unwrap();
                }
                expect_change(&mut watcher, "the folder was removed").await;
                let _ = timeout(CHECK * 2, watcher.changed()).await;
            }
        });
    }

    #[test]
    fn a_change_is_told_within_a_second_though_others_keep_coming() {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("web.yaml");
            let mut watcher = Watcher::new(dir.path());
            let start = Instant::now();
            let writer = async {
                loop {
                    fs::write(&file, "a").unwrap();
                    tokio::time::sleep(QUIET / 5).await;
                }
            };
            tokio::select! {
                () = writer => {}
                () = watcher.changed() => {}
            }
            let elapsed = start.elapsed();
            // Without patience it would be never.
            assert!(elapsed < PATIENCE * 4, "{elapsed:?}");
        });
    }

    #[test]
    fn a_wait_that_is_given_up_loses_no_change() {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let mut watcher = Watcher::new(dir.path());
            fs::write(dir.path().join("web.yaml"), "a").unwrap();
            for _ in 0..3 {
                if timeout(QUIET / 5, watcher.changed()).await.is_ok() {
                    // This machine is so busy that the change was told already.
                    return;
                }
            }
            expect_change(&mut watcher, "a file was written").await;
        });
    }
}
