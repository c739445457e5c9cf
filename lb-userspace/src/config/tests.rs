use std::fs;

use clap::CommandFactory as _;

use super::*;
use crate::cli;

/// What a command line amounts to, with a file of this text as `FILE`.
fn parsed(arguments: &str, text: &str) -> Result<Configuration, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("viaduct.yaml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let arguments: Vec<OsString> =
        format!("viaduct {arguments}").split(' ').map(|word| word.replace("FILE", path).into()).collect();
    match parse(&cli::Command::command(), &arguments) {
        Ok((_, configuration)) => Ok(configuration),
        Err(error) => Err(format!("{error:#}").replace(path, "FILE")),
    }
}

fn setting(configuration: &Configuration, key: &str) -> (Value, String) {
    let setting = configuration.settings.iter().find(|setting| setting.key == key).unwrap();
    let source = match &setting.source {
        Source::File(_, line) => format!("line {line}"),
        source => source.to_string(),
    };
    (setting.value.clone(), source)
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let text = "maxFlows: 65536\n# mine\nmaxBackends: 100\nbpffs: /a\npodInterfaces: [eth1, 'b*,c*']\nmark: 0x2000\n\
                answerEcho: false\nconntrackTcpTimeoutEstablished: 1h30m\nunservedPorts: refuse\n";
    for command in ["agent", "config show"] {
        let configuration = parsed(&format!("{command} --config FILE --max-backends 200"), text).unwrap();
        for (key, value, source) in [
            ("maxFlows", Value::from(65536), "line 1"),
            ("maxBackends", Value::from(200), "--max-backends"),
            ("bpffs", Value::from("/a"), "line 4"),
            ("podInterfaces", Value::from(vec!["eth1", "b*", "c*"]), "line 5"),
            ("mark", Value::from(0x2000), "line 6"),
            ("answerEcho", Value::from(false), "line 7"),
            ("conntrackTcpTimeoutEstablished", Value::from("1h30m"), "line 8"),
            ("unservedPorts", Value::from("refuse"), "line 9"),
            ("conntrackUdpTimeout", Value::from("30s"), "default"),
            ("logFormat", Value::from("text"), "default"),
            ("kubeconfig", Value::Null, "default"),
        ] {
            assert_eq!(setting(&configuration, key), (value, source.to_owned()), "{key}");
        }
    }
    let configuration = parsed("--bpffs /b agent --config FILE", text).unwrap();
    assert_eq!(setting(&configuration, "bpffs"), (Value::from("/b"), "--bpffs".to_owned()));
}

#[test]
fn what_is_in_force_is_a_file_that_says_the_same() {
    let flags = "agent --server https://10.0.0.1:6443 --healthz-bind-address= --mark 0 --log-level debug,kube=trace";
    let configuration = parsed(flags, "").unwrap();
    let again = parsed("agent --config FILE", &Value::Object(configuration.values()).to_string()).unwrap();
    assert_eq!(again.values(), configuration.values());
    assert_eq!(setting(&again, "healthzBindAddress"), (Value::from(""), "line 1".to_owned()));
}

#[test]
fn each_mistake_in_a_file_is_one_line_with_its_place_and_what_to_do() {
    for (text, expected) in [
        ("\nmaxFlwos: 1", "FILE:2: maxFlwos: is no option; did you mean maxFlows?"),
        ("max-flows: 2000", "FILE:1: max-flows: is no option; did you mean maxFlows?"),
        ("output: json", "FILE:1: output: is no option; "),
        (
            "maxFlows: 2000\nmark: 1\nmaxFlows: 3000",
            "FILE:3: maxFlows: is given in line 1 already; remove one of the two",
        ),
        ("maxFlows: many", "FILE:1: maxFlows: \"many\": "),
        ("maxFlows: 1", "FILE:1: maxFlows: 1: 1 is not in 1024..=67108864"),
        ("maxFlows: [2000]", "FILE:1: maxFlows: is a list; give one value"),
        ("maxFlows: {is: 1}", "FILE:1: maxFlows: is a mapping; give one value"),
        ("maxFlows:", "FILE:1: maxFlows: has no value; give one, or remove the line"),
        ("hostnameOverride: true", "FILE:1: hostnameOverride: is true, which this option does not take; "),
        ("hostnameOverride: 007", "FILE:1: hostnameOverride: is the number 7"),
        ("podInterfaces: []", "FILE:1: podInterfaces: is an empty list; give a value"),
        ("mark: 3", "FILE:1: mark: 3: give one bit of 32, such as 0x1000, or 0"),
        ("answerEcho: yes please", "FILE:1: answerEcho: \"yes please\": give true or false"),
        (
            "conntrackUdpTimeout: 30",
            "FILE:1: conntrackUdpTimeout: 30: give a time from 1s to 87600h, such as 30s, 3m or 24h",
        ),
        ("conntrackUdpTimeout: 0s", "FILE:1: conntrackUdpTimeout: \"0s\": give a time from 1s to 87600h"),
        (
            "hairpinAddresses: [127.0.0.1]",
            "FILE:1: hairpinAddresses: [\"127.0.0.1\"]: give a unicast address that nobody has",
        ),
        ("handover: both", "FILE:1: handover: \"both\": give none, from-kube-proxy or to-kube-proxy"),
        ("logLevel: loud", "FILE:1: logLevel: \"loud\": give error, warn, info, debug or trace"),
        ("metricsBindAddress: 10249", "FILE:1: metricsBindAddress: 10249: give an IP address and a port, "),
        ("- maxFlows", "FILE:1: invalid type: sequence, expected options and their values, "),
        ("mark: 1\nmaxFlows: 2: 3", "FILE:2: mapping values are not allowed"),
    ] {
        let error = parsed("agent --config FILE", text).expect_err(text);
        assert!(error.starts_with(expected) && error.lines().count() == 1, "{text:?}: {error}");
    }
    let error = parsed("agent --config FILE.missing", "").unwrap_err();
    assert!(error.starts_with("--config FILE.missing: cannot read the file: "), "{error}");
}

#[test]
fn mistakes_on_the_command_line_stay_those_of_clap() {
    let error = parsed("agent --config FILE --mark 3", "mark: 2").unwrap_err();
    assert!(error.contains("invalid value '3' for '--mark <BIT>': give one bit of 32"), "{error}");
}
