//! Completions, manual pages and `docs/operators/yard.md`, all from the definitions that parse the command line.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::{EXAMPLES, Yard};
use crate::config::reference::{GROUPS, Key, short};
use crate::daemon::args::{EXAMPLES as DAEMON_EXAMPLES, Yardd};

/// The completion script of `yard`.
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Yard::command(), "yard", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

const YARD_FILES: &[(&str, &str)] =
    &[("/run/switchyard/yardd.sock", "Socket of the daemon, unless its configuration names another.")];
const YARDD_FILES: &[(&str, &str)] = &[
    ("/etc/switchyard/switchyard.toml", "The configuration; see switchyard.toml(5)."),
    ("/run/switchyard/yardd.sock", "Socket of the API, unless the configuration names another."),
    ("/run/switchyard/vm/NAME/", "A running VM's sockets and logs: vm/NAME beside the API's socket."),
];
const YARD_STATUS: &[(&str, &str)] = &[
    ("0", "Done."),
    ("1", "The request failed."),
    ("2", "The command line is wrong."),
    ("3", "There is no such switch, port, queue, address, VM or adapter."),
    ("4", "Something of that name exists already."),
    ("5", "The daemon does not answer."),
];
const YARDD_STATUS: &[(&str, &str)] = &[
    ("0", "Ended by SIGTERM or SIGINT; or the check or offline run went well."),
    ("1", "It could not start."),
    ("2", "The command line is wrong."),
];
const ENVIRONMENT: &[(&str, &str)] = &[
    ("YARD_SOCKET", "Socket of the daemon, unless --socket is given."),
    ("NO_COLOR", "If set, tables have no colour. They have none either where the output is no terminal."),
];
const YARDD_ENVIRONMENT: &[(&str, &str)] = &[
    (
        "NOTIFY_SOCKET",
        "Set by systemd: told READY=1 when the configuration is in force, and STOPPING=1 at the end.",
    ),
    ("NO_COLOR", "If set, the log has no colour."),
];

/// A titled list of a manual page.
type Section = (&'static str, &'static [(&'static str, &'static str)]);

/// Writes every page to `dir`, which is made if it is missing.
///
/// # Errors
/// If a page cannot be written.
pub fn write_pages(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let sections: [Section; 4] = [
        ("EXAMPLES", EXAMPLES),
        ("FILES", YARD_FILES),
        ("ENVIRONMENT", ENVIRONMENT),
        ("EXIT STATUS", YARD_STATUS),
    ];
    std::fs::write(dir.join("yard.1"), page(Yard::command(), "1", &sections)?)?;
    // Once built, every subcommand knows its whole name.
    let mut root = Yard::command();
    root.build();
    for (name, command) in subcommands(&root, "yard") {
        let file = format!("{}.1", name.replace(' ', "-"));
        std::fs::write(dir.join(file), page(command, "1", &[("EXIT STATUS", YARD_STATUS)])?)?;
    }
    let sections: [Section; 4] = [
        ("EXAMPLES", DAEMON_EXAMPLES),
        ("FILES", YARDD_FILES),
        ("ENVIRONMENT", YARDD_ENVIRONMENT),
        ("EXIT STATUS", YARDD_STATUS),
    ];
    std::fs::write(dir.join("yardd.8"), page(Yardd::command(), "8", &sections)?)?;
    std::fs::write(dir.join("switchyard.toml.5"), configuration_page())
}

/// `command`'s page of a section of the manual, with more sections at its end.
fn page(command: Command, number: &str, sections: &[Section]) -> io::Result<Vec<u8>> {
    // What `--help` says after the options is said by the sections below.
    let man = Man::new(command.after_help("").disable_help_subcommand(true))
        .section(number)
        .manual("Switchyard")
        .source(concat!("Switchyard ", env!("CARGO_PKG_VERSION")));
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    if man_has_subcommands(sections) {
        man.render_subcommands_section(&mut out)?;
    }
    for (title, entries) in sections {
        writeln!(out, ".SH \"{title}\"")?;
        for (term, text) in *entries {
            writeln!(out, ".TP\n\\fB{}\\fR\n{}", roff(term), roff(text))?;
        }
    }
    writeln!(out, ".SH \"SEE ALSO\"\n\\fByard\\fR(1), \\fByardd\\fR(8), \\fBswitchyard.toml\\fR(5)")?;
    Ok(out)
}

/// Pages with examples are those of whole programs.
fn man_has_subcommands(sections: &[Section]) -> bool {
    sections.iter().any(|(title, entries)| {
        *title == "EXAMPLES" && entries.iter().any(|(term, _)| term.starts_with("yard "))
    })
}

/// Text that roff sets as it is.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

/// switchyard.toml(5).
fn configuration_page() -> String {
    let mut out = String::from(
        ".TH switchyard.toml 5 \"\" \"Switchyard\" \"Switchyard\"\n\
         .SH NAME\nswitchyard.toml \\- configuration of yardd\n\
         .SH DESCRIPTION\nA TOML file. Every mistake in it is reported at once, each with file, line, key, what was found and\n\
         what was expected; \\fByardd \\-\\-check\\fR only checks it.\n",
    );
    for group in GROUPS {
        let _ = write!(out, ".SH \"{}\"\n{}\n", roff(group.table), roff(group.text));
        for key in group.keys {
            let Key { path, range, default, text } = key;
            let _ = write!(
                out,
                ".TP\n\\fB{}\\fR\n{} Values: {}. Default: {}.\n",
                roff(short(path)),
                roff(text),
                roff(range),
                roff(default)
            );
        }
    }
    out.push_str(
        ".SH FILES\n/etc/switchyard/switchyard.toml\n.SH \"SEE ALSO\"\n\\fByardd\\fR(8), \\fByard\\fR(1)\n",
    );
    out
}

/// Every command below `command`, by its whole name.
fn subcommands(command: &Command, name: &str) -> Vec<(String, Command)> {
    let mut found = Vec::new();
    for below in command.get_subcommands().filter(|below| below.get_name() != "help") {
        let whole = format!("{name} {}", below.get_name());
        found.push((whole.clone(), below.clone()));
        found.extend(subcommands(below, &whole));
    }
    found
}

/// The help of every command, by its whole name, in lines of at most 100 characters.
pub fn helps() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (mut root, name) in [(Yard::command(), "yard"), (Yardd::command(), "yardd")] {
        root = root.term_width(100);
        root.build();
        found.push((name.to_owned(), root.render_long_help().to_string()));
        for (name, mut command) in subcommands(&root, name) {
            command = command.term_width(100);
            found.push((name, command.render_long_help().to_string()));
        }
    }
    found
}

/// `docs/operators/yard.md`.
pub fn markdown() -> String {
    let mut out = String::from(
        "# yard and yardd\n\nThe help of every command, as `--help` prints it. `yard man DIR` writes the same as manual pages, with examples;\n\
         `yard completions SHELL` prints completions.\n\n## Examples\n\n",
    );
    for (command, text) in EXAMPLES.iter().chain(DAEMON_EXAMPLES) {
        let _ = writeln!(out, "- `{command}`\n  {text}");
    }
    for (title, entries) in
        [("Files", YARDD_FILES), ("Environment", ENVIRONMENT), ("Exit status", YARD_STATUS)]
    {
        let _ = write!(out, "\n## {title}\n\n");
        for (term, text) in entries {
            let _ = writeln!(out, "- `{term}`: {text}");
        }
    }
    for (name, help) in helps() {
        let _ = write!(out, "\n## `{name}`\n\n```text\n{}\n```\n", help.trim_end());
    }
    out
}
