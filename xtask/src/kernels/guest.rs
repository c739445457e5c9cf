//! Boots one kernel, runs one command in it, and fetches the result through a shared folder.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    fs::{self, File},
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{Job, image::Kernel, initrd};

const MEGABYTES: u32 = 2048;
const CPUS: u32 = 2;

/// What became of a guest.
pub(super) struct Finished {
    /// Seconds the kernel had been up when the command started; none if it never got there.
    pub(super) ready: Option<f32>,
    /// The command's exit status; none if it never ended.
    pub(super) exit: Option<i32>,
    pub(super) timed_out: bool,
    /// The log of the command.
    pub(super) output: PathBuf,
    /// The log of the kernel.
    pub(super) console: PathBuf,
}

/// `folder` is emptied first; the logs stay in it.
pub(super) fn run(kernel: &Kernel, job: &Job, folder: &Path, timeout: Duration) -> Result<Finished> {
    fs::remove_dir_all(folder).ok();
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let initrd = folder.join("initrd");
    fs::write(&initrd, initrd::build(kernel, include_str!("init.sh"))?)?;
    fs::write(folder.join("stage2.sh"), stage2(kernel, job)?)?;
    let mut qemu = boot(kernel, &initrd, folder)?;
    let deadline = Instant::now() + timeout;
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = qemu.0.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            timed_out = true;
            break None;
        }
        thread::sleep(Duration::from_millis(50));
    };
    drop(qemu);
    fs::remove_file(&initrd).ok();
    if status.is_some_and(|status| !status.success()) {
        let said = fs::read_to_string(folder.join("qemu.log")).unwrap_or_default();
        bail!("qemu failed: {}", said.trim());
    }
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    Ok(Finished {
        ready: read("ready").and_then(|seconds| seconds.trim().parse().ok()),
        exit: read("exit").and_then(|status| status.trim().parse().ok()),
        timed_out,
        output: folder.join("output.log"),
        console: folder.join("console.log"),
    })
}

/// A QEMU that dies with us.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn boot(kernel: &Kernel, initrd: &Path, folder: &Path) -> Result<Qemu> {
    let share = |path: &Path, tag: &str, options: &str| -> Result<String> {
        let path = path.to_str().context("the path of the workspace is not UTF-8")?.replace(',', ",,");
        Ok(format!("local,path={path},mount_tag={tag},security_model=none,multidevs=remap{options}"))
    };
    let log = File::create(folder.join("qemu.log"))?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        // Without la57, whose five levels of page tables cost the emulation a lot.
        .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"])
        .args(["-smp", &CPUS.to_string(), "-m", &MEGABYTES.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-virtfs", &share(Path::new("/"), "host", ",readonly=on")?])
        .args(["-virtfs", &share(folder, "guest", "")?])
        .args(["-serial", &format!("file:{}", folder.join("console.log").display())])
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // SAFETY: between fork and exec only prctl is called, which is a plain system call.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    Ok(Qemu(command.spawn().context("cannot run qemu-system-x86_64")?))
}

/// The script that runs on the host's files: the variables, a function that is the command, and the fixed rest.
fn stage2(kernel: &Kernel, job: &Job) -> Result<String> {
    let folder = std::env::current_dir().context("no current folder")?;
    let mut script = String::new();
    for (name, value) in &job.environment {
        writeln!(script, "export {name}={}", quoted(value)?)?;
    }
    writeln!(script, "modules={}", quoted(kernel.base.join("lib/modules").as_os_str())?)?;
    let words = job.command.iter().map(|word| quoted(word)).collect::<Result<Vec<_>>>()?;
    // In a shell of its own, so that it cannot end this one.
    writeln!(script, "run_command() (\n    cd {} && {}\n)", quoted(folder.as_os_str())?, words.join(" "))?;
    script.push_str(include_str!("stage2.sh"));
    Ok(script)
}

/// One word for a shell.
fn quoted(word: &OsStr) -> Result<String> {
    let word = std::str::from_utf8(word.as_bytes()).context("arguments and paths must be UTF-8")?;
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_guests_shell() {
        let words = ["plain", "two words", "it's", "$HOME `id` \\ \"x\"", ""];
        let script = words.map(|word| quoted(OsStr::new(word)).unwrap()).join(" ");
        let output = Command::new("sh").args(["-c", &format!("printf '%s\\n' {script}")]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words.map(|word| format!("{word}\n")).concat());
    }
}
