//! Whether a text is a condition about `node`: its names, its types and what it may cost at most, told before it is
//! ever evaluated. Knows the language and the names; knows no node.

use cel::Program;
use cel::common::ast::{CallExpr, ComprehensionExpr, EntryExpr, Expr, IdedExpr, LiteralValue, operators};

use berth_protocol::limits::{CEL_BYTES_MAX, CEL_STEPS_MAX, LABELS_PER_NODE_MAX};

/// What is wrong with a condition, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// In characters from the start of the text; none: the text as a whole.
    pub at: Option<usize>,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq)]
enum Type {
    Bool,
    Whole,
    Fraction,
    Text,
    Null,
    List(Box<Type>),
    /// From texts.
    Map(Box<Type>),
    Object(&'static Object),
    /// Of an empty list, or where the checker gives up: goes with everything.
    Any,
}

#[derive(Debug, PartialEq)]
struct Object {
    name: &'static str,
    fields: &'static [(&'static str, Kind)],
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Whole,
    Fraction,
    Text,
    Texts,
    Features,
    Labels,
    Object(&'static Object),
}

/// What conditions see; `rulebook` fills it in.
static NODE: Object = Object {
    name: "node",
    fields: &[
        ("name", Kind::Text),
        ("hostname", Kind::Text),
        ("labels", Kind::Labels),
        ("taints", Kind::Texts),
        ("arch", Kind::Text),
        ("os", Kind::Text),
        ("kernel", Kind::Text),
        ("cores", Kind::Fraction),
        ("memory", Kind::Whole),
        ("disk", Kind::Whole),
        ("cpu", Kind::Object(&CPU)),
        ("gpu", Kind::Object(&GPU)),
        ("versions", Kind::Object(&VERSIONS)),
    ],
};
static CPU: Object =
    Object { name: "node.cpu", fields: &[("model", Kind::Text), ("features", Kind::Features)] };
static GPU: Object = Object {
    name: "node.gpu",
    fields: &[("count", Kind::Whole), ("model", Kind::Text), ("memory", Kind::Whole)],
};
static VERSIONS: Object = Object {
    name: "node.versions",
    fields: &[
        ("agent", Kind::Text),
        ("kernel", Kind::Text),
        ("criu", Kind::Text),
        ("driver", Kind::Text),
        ("cuda", Kind::Text),
    ],
};

/// What a name that another system uses is called here.
const FOREIGN: [(&str, &str); 9] = [
    ("cpus", "cores"),
    ("mem", "memory"),
    ("gpus", "gpu"),
    ("hostName", "hostname"),
    ("architecture", "arch"),
    ("label", "labels"),
    ("nodeName", "name"),
    ("driver", "versions.driver"),
    ("cuda", "versions.cuda"),
];

const FUNCTIONS: [&str; 9] =
    ["size", "contains", "startsWith", "endsWith", "atLeast", "int", "double", "string", "has"];

/// Most elements that one of a node's lists has: its processor's features.
const FEATURES_MAX: u64 = 256;

/// Compiles a condition that is one.
pub fn compile(text: &str) -> Result<Program, Fault> {
    let whole = |message: String| Fault { at: None, message };
    if text.len() > CEL_BYTES_MAX {
        return Err(whole(format!("is {} bytes long, at most {CEL_BYTES_MAX} are allowed", text.len())));
    }
    let program = Program::compile(text).map_err(|errors| match errors.errors.first() {
        Some(error) => Fault {
            at: offset(text, error.pos),
            message: format!("is not CEL: {}", error.msg.lines().next().unwrap_or_default()),
        },
        None => whole("is not CEL: it is empty".to_owned()),
    })?;
    let mut checker = Checker { program: &program, variables: Vec::new() };
    let (kind, cost) = checker.check(program.expression())?;
    if !matches!(kind, Type::Bool | Type::Any) {
        return Err(whole(format!("gives {}, not true or false", kind.words())));
    }
    if cost.steps > CEL_STEPS_MAX {
        let steps = cost.steps;
        return Err(whole(format!(
            "may take {steps} steps on one node, at most {CEL_STEPS_MAX} are allowed"
        )));
    }
    Ok(program)
}

/// Of a line and a column, both from 1, in characters.
fn offset(text: &str, (line, column): (isize, isize)) -> Option<usize> {
    let line = usize::try_from(line).ok()?.checked_sub(1)?;
    let before: usize = text.split('\n').take(line).map(|l| l.chars().count() + 1).sum();
    Some((before + usize::try_from(column).ok()?).min(text.chars().count()))
}

/// What evaluating an expression takes at most, and how many elements its value has.
#[derive(Debug, Clone, Copy)]
struct Cost {
    steps: u64,
    elements: u64,
}

impl Cost {
    fn of(steps: u64) -> Self {
        Self { steps, elements: 1 }
    }
}

struct Checker<'p> {
    program: &'p Program,
    /// Innermost last.
    variables: Vec<(String, Type, u64)>,
}

type Checked = Result<(Type, Cost), Fault>;

impl Checker<'_> {
    fn fault<T>(&self, expr: &IdedExpr, message: String) -> Result<T, Fault> {
        let at = self.program.source_info().offset_for(expr.id).map(|(start, _)| start as usize);
        Err(Fault { at, message })
    }

    fn check(&mut self, expr: &IdedExpr) -> Checked {
        match &expr.expr {
            Expr::Literal(literal) => Ok((literal_type(literal), Cost::of(1))),
            Expr::Ident(name) => self.variable(expr, name),
            Expr::Select(select) => {
                let (holder, cost) = self.check(&select.operand)?;
                let (kind, elements) = self.field(expr, &holder, &select.field)?;
                let kind = if select.test { Type::Bool } else { kind };
                Ok((kind, Cost { steps: cost.steps + 1, elements }))
            }
            Expr::Call(call) => self.call(expr, call),
            Expr::Comprehension(walk) => self.walk(expr, walk),
            Expr::List(list) => {
                let (mut of, mut steps) = (Type::Any, 1);
                for element in &list.elements {
                    let (kind, cost) = self.check(element)?;
                    if !alike(&of, &kind) {
                        let message = format!("is {} in a list of {}", kind.words(), of.words());
                        return self.fault(element, message);
                    }
                    (of, steps) = (join(of, kind), steps + cost.steps);
                }
                Ok((Type::List(Box::new(of)), Cost { steps, elements: list.elements.len() as u64 }))
            }
            Expr::Map(map) => {
                let (mut of, mut steps) = (Type::Any, 1);
                for entry in &map.entries {
                    let EntryExpr::MapEntry(entry) = &entry.expr else { continue };
                    let (key, cost) = self.check(&entry.key)?;
                    if !alike(&key, &Type::Text) {
                        return self.fault(&entry.key, format!("is {} as a key, not text", key.words()));
                    }
                    let (kind, more) = self.check(&entry.value)?;
                    (of, steps) = (join(of, kind), steps + cost.steps + more.steps);
                }
                Ok((Type::Map(Box::new(of)), Cost { steps, elements: map.entries.len() as u64 }))
            }
            Expr::Struct(of) => {
                self.fault(expr, format!("makes a `{}`, which is not known here", of.type_name))
            }
            Expr::Unspecified => self.fault(expr, "is empty".to_owned()),
        }
    }

    fn variable(&self, expr: &IdedExpr, name: &str) -> Checked {
        if let Some((_, kind, elements)) = self.variables.iter().rev().find(|(known, ..)| known == name) {
            return Ok((kind.clone(), Cost { steps: 1, elements: *elements }));
        }
        if name == NODE.name {
            return Ok((Type::Object(&NODE), Cost::of(1)));
        }
        let field = NODE.fields.iter().find(|(field, _)| *field == name).map(|(field, _)| *field);
        let known = ["node", "true", "false"].into_iter();
        let hint = field
            .map(|field| format!("node.{field}"))
            .or_else(|| foreign(name).map(|name| format!("node.{name}")))
            .or_else(|| nearest(name, known.chain(self.variables.iter().map(|(name, ..)| name.as_str()))))
            .map_or_else(
                || ": conditions are about `node`; write text in quotes".to_owned(),
                |name| format!(", did you mean `{name}`?"),
            );
        self.fault(expr, format!("the name `{name}` is unknown{hint}"))
    }

    fn field(&self, expr: &IdedExpr, holder: &Type, name: &str) -> Result<(Type, u64), Fault> {
        let object = match holder {
            Type::Any => return Ok((Type::Any, FEATURES_MAX)),
            Type::Map(of) => return Ok(((**of).clone(), 1)),
            Type::Object(object) => object,
            other => {
                return self
                    .fault(expr, format!("`{name}` is asked of {}, which has no fields", other.words()));
            }
        };
        if let Some((_, kind)) = object.fields.iter().find(|(field, _)| *field == name) {
            return Ok(match kind {
                Kind::Whole => (Type::Whole, 1),
                Kind::Fraction => (Type::Fraction, 1),
                Kind::Text => (Type::Text, 1),
                Kind::Texts => (Type::List(Box::new(Type::Text)), LABELS_PER_NODE_MAX as u64),
                Kind::Features => (Type::List(Box::new(Type::Text)), FEATURES_MAX),
                Kind::Labels => (Type::Map(Box::new(Type::Text)), LABELS_PER_NODE_MAX as u64),
                Kind::Object(object) => (Type::Object(object), 1),
            });
        }
        let within = |name: &str| Some(format!("{}.{name}", object.name));
        let known = || object.fields.iter().map(|(field, _)| *field);
        let hint = nearest(name, known())
            .or_else(|| foreign(name).map(str::to_owned).filter(|_| object.name == NODE.name))
            .and_then(|name| within(&name));
        let hint = match hint {
            Some(hint) => format!("did you mean `{hint}`?"),
            None if object.name == NODE.name => {
                format!(
                    "labels are `node.labels.{name}`; known are {}",
                    known().collect::<Vec<_>>().join(", ")
                )
            }
            None => format!("known are {}", known().collect::<Vec<_>>().join(", ")),
        };
        self.fault(expr, format!("`{}` has no field `{name}`: {hint}", object.name))
    }

    fn call(&mut self, expr: &IdedExpr, call: &CallExpr) -> Checked {
        let mut kinds = Vec::new();
        let mut cost = Cost::of(1);
        for arg in call.target.as_deref().into_iter().chain(&call.args) {
            let (kind, more) = self.check(arg)?;
            cost.steps = cost.steps.saturating_add(more.steps);
            cost.elements = cost.elements.max(more.elements);
            kinds.push(kind);
        }
        let kind = match (call.func_name.as_str(), &kinds[..]) {
            (operators::LOGICAL_AND | operators::LOGICAL_OR, [a, b]) => {
                for (kind, arg) in [a, b].into_iter().zip(&call.args) {
                    if !alike(kind, &Type::Bool) {
                        let message = format!("is {}, where true or false is due", kind.words());
                        return self.fault(arg, message);
                    }
                }
                Type::Bool
            }
            (operators::LOGICAL_NOT | operators::NOT_STRICTLY_FALSE, [a]) if alike(a, &Type::Bool) => {
                Type::Bool
            }
            (operators::CONDITIONAL, [test, a, b]) if alike(test, &Type::Bool) && alike(a, b) => {
                join(a.clone(), b.clone())
            }
            (operators::EQUALS | operators::NOT_EQUALS, [a, b]) => {
                if !comparable(a, b) {
                    return self.fault(expr, format!("compares {} with {}", a.words(), b.words()));
                }
                cost.steps = cost.steps.saturating_add(cost.elements);
                Type::Bool
            }
            (
                operators::LESS | operators::LESS_EQUALS | operators::GREATER | operators::GREATER_EQUALS,
                [a, b],
            ) => {
                let ordered = |kind: &Type| kind.is_number() || alike(kind, &Type::Text);
                if !comparable(a, b) || !ordered(a) || !ordered(b) {
                    return self.fault(expr, format!("compares {} with {}", a.words(), b.words()));
                }
                Type::Bool
            }
            (operators::ADD, [Type::List(a), Type::List(b)]) if alike(a, b) => {
                Type::List(Box::new(join((**a).clone(), (**b).clone())))
            }
            (operators::ADD, [Type::Text, Type::Text]) => Type::Text,
            (
                operators::ADD
                | operators::SUBSTRACT
                | operators::MULTIPLY
                | operators::DIVIDE
                | operators::MODULO,
                [a, b],
            ) => {
                if a.is_number() && b.is_number() && !alike(a, b) {
                    let message =
                        "computes with a whole number and a fraction: write both alike, as 2.0".to_owned();
                    return self.fault(expr, message);
                }
                if !a.is_number() || !b.is_number() {
                    return self.fault(expr, format!("computes with {} and {}", a.words(), b.words()));
                }
                join(a.clone(), b.clone())
            }
            (operators::NEGATE, [a]) if a.is_number() => a.clone(),
            (operators::INDEX, [Type::List(of), at]) if alike(at, &Type::Whole) => (**of).clone(),
            (operators::INDEX, [Type::Map(of), key]) if alike(key, &Type::Text) => (**of).clone(),
            (operators::INDEX, [Type::Any, _]) => Type::Any,
            (operators::INDEX, [holder @ Type::Object(_), Type::Text]) => {
                let Some(Expr::Literal(LiteralValue::String(name))) = call.args.get(1).map(|arg| &arg.expr)
                else {
                    return self.fault(expr, format!("{} takes its fields by name", holder.words()));
                };
                let name = name.inner().to_owned();
                let (kind, elements) = self.field(expr, holder, &name)?;
                cost.elements = elements;
                kind
            }
            (operators::IN, [a, Type::List(of)]) if comparable(a, of) => {
                cost.steps = cost.steps.saturating_add(cost.elements);
                Type::Bool
            }
            (operators::IN, [a, Type::Map(_)]) if alike(a, &Type::Text) => Type::Bool,
            (operators::IN, [_, Type::Any]) => Type::Bool,
            ("size", [Type::Text | Type::List(_) | Type::Map(_) | Type::Any]) => Type::Whole,
            ("contains" | "startsWith" | "endsWith" | "atLeast", [a, b])
                if call.target.is_some() && alike(a, &Type::Text) && alike(b, &Type::Text) =>
            {
                Type::Bool
            }
            ("int", [a]) if a.is_number() || alike(a, &Type::Text) => Type::Whole,
            ("double", [a]) if a.is_number() || alike(a, &Type::Text) => Type::Fraction,
            ("string", [a]) if a.is_number() || alike(a, &Type::Text) => Type::Text,
            (name, kinds) => return self.no_such_call(expr, name, kinds),
        };
        if !matches!(kind, Type::List(_) | Type::Map(_) | Type::Any) {
            cost.elements = 1;
        }
        Ok((kind, cost))
    }

    fn no_such_call<T>(&self, expr: &IdedExpr, name: &str, kinds: &[Type]) -> Result<T, Fault> {
        let words: Vec<String> = kinds.iter().map(Type::words).collect();
        let shown = match name {
            operators::IN => "in",
            operators::INDEX => "[ ]",
            operators::CONDITIONAL => "? :",
            operators::LOGICAL_NOT => "!",
            operators::NEGATE => "-",
            name => name,
        };
        if shown != name || FUNCTIONS.contains(&name) {
            return self.fault(expr, format!("`{shown}` does not take {}", words.join(" and ")));
        }
        let macros = ["all", "exists", "exists_one", "map", "filter"];
        let hint = nearest(name, FUNCTIONS.into_iter().chain(macros));
        let hint = hint.map_or_else(
            || format!("known are {}, {}", FUNCTIONS.join(", "), macros.join(", ")),
            |name| format!("did you mean `{name}`?"),
        );
        self.fault(expr, format!("the function `{name}` is unknown: {hint}"))
    }

    /// `exists`, `all`, `map` and the like, which the parser has written out as a walk over a list or map.
    fn walk(&mut self, expr: &IdedExpr, walk: &ComprehensionExpr) -> Checked {
        let (range, range_cost) = self.check(&walk.iter_range)?;
        let of = match &range {
            Type::List(of) => (**of).clone(),
            Type::Map(_) => Type::Text,
            Type::Any => Type::Any,
            other => return self.fault(expr, format!("walks over {}, which is no list", other.words())),
        };
        let turns = range_cost.elements;
        let (start, _) = self.check(&walk.accu_init)?;
        let depth = self.variables.len();
        self.variables.push((walk.iter_var.clone(), of.clone(), 1));
        if let Some(second) = &walk.iter_var2 {
            self.variables.push((second.clone(), of, 1));
        }
        self.variables.push((walk.accu_var.clone(), start.clone(), 1));
        let (_, test) = self.check(&walk.loop_cond)?;
        let (grown, step) = self.check(&walk.loop_step)?;
        self.variables.truncate(depth);
        self.variables.push((walk.accu_var.clone(), join(start, grown), turns));
        let (kind, last) = self.check(&walk.result)?;
        self.variables.truncate(depth);
        let turn = test.steps.saturating_add(step.steps);
        let steps = turns.saturating_mul(turn).saturating_add(range_cost.steps).saturating_add(last.steps);
        Ok((kind, Cost { steps, elements: turns }))
    }
}

fn literal_type(literal: &LiteralValue) -> Type {
    match literal {
        LiteralValue::Boolean(_) => Type::Bool,
        LiteralValue::Int(_) | LiteralValue::UInt(_) => Type::Whole,
        LiteralValue::Double(_) => Type::Fraction,
        LiteralValue::String(_) => Type::Text,
        LiteralValue::Null => Type::Null,
        LiteralValue::Bytes(_) => Type::Any,
    }
}

impl Type {
    fn is_number(&self) -> bool {
        matches!(self, Type::Whole | Type::Fraction | Type::Any)
    }

    fn words(&self) -> String {
        match self {
            Type::Bool => "true or false".to_owned(),
            Type::Whole => "a whole number".to_owned(),
            Type::Fraction => "a number".to_owned(),
            Type::Text => "text".to_owned(),
            Type::Null => "null".to_owned(),
            Type::List(_) => "a list".to_owned(),
            Type::Map(_) => "a map".to_owned(),
            Type::Object(object) => format!("`{}`", object.name),
            Type::Any => "anything".to_owned(),
        }
    }
}

fn alike(a: &Type, b: &Type) -> bool {
    match (a, b) {
        (Type::Any, _) | (_, Type::Any) => true,
        (Type::List(a), Type::List(b)) | (Type::Map(a), Type::Map(b)) => alike(a, b),
        (a, b) => a == b,
    }
}

/// Numbers of both kinds compare.
fn comparable(a: &Type, b: &Type) -> bool {
    alike(a, b) || (a.is_number() && b.is_number())
}

fn join(a: Type, b: Type) -> Type {
    match (a, b) {
        (Type::Any, known) | (known, Type::Any) => known,
        (Type::List(a), Type::List(b)) => Type::List(Box::new(join(*a, *b))),
        (a, b) if a == b => a,
        _ => Type::Any,
    }
}

fn foreign(name: &str) -> Option<&'static str> {
    FOREIGN.iter().find(|(foreign, _)| foreign.eq_ignore_ascii_case(name)).map(|(_, known)| *known)
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let distance = |known: &str| strsim::osa_distance(&known.to_lowercase(), &name.to_lowercase());
    let near = |known: &&str| {
        let distance = distance(known);
        distance <= known.len().div_ceil(3).min(3) && distance < known.len()
    };
    known.filter(near).min_by_key(|known| distance(known)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message, with a bar at the place where it points.
    fn refused(text: &str) -> String {
        let fault = compile(text).map(|_| ()).unwrap_err();
        let place = fault.at.map(|at| {
            let (before, after): (String, String) =
                (text.chars().take(at).collect(), text.chars().skip(at).collect());
            format!("{before}|{after} ")
        });
        format!("{}{}", place.unwrap_or_default(), fault.message)
    }

    #[test]
    fn what_is_a_condition() {
        for text in [
            "true",
            "node.arch == 'x86_64'",
            "node.labels.zone == \"lab\" && node.cores >= 2",
            "node.cores >= 2.5 && node.memory > 8 * 1024 * 1024 * 1024",
            "node.gpu.count > 0 && node.gpu.memory >= 16000000000 && node.gpu.model.contains('A100')",
            "has(node.labels.rack) && node.labels['rack'] in ['r1', 'r2']",
            "'spot' in node.taints || 'zone' in node.labels",
            "node.taints.exists(t, t.startsWith('a'))",
            "node.labels.all(k, node.labels[k] != 'x')",
            "size(node.taints.filter(t, t != 'spot')) == 0",
            "node.taints.map(t, t + '!').exists(t, t == 'spot!')",
            "node.versions.kernel.atLeast('6.1')",
            "'avx2' in node.cpu.features && node.cpu.model.contains('EPYC')",
            "node.gpu.count == 0 ? node.cores > 4 : true",
            "int(node.labels.slot) > 3",
            "!(node.name == 'a1')",
        ] {
            if let Err(fault) = compile(text) {
                panic!("{text}: {fault:?}");
            }
        }
    }

    #[test]
    fn what_is_not_is_told_with_its_place() {
        for (text, message) in [
            ("node.lables.zone == 'lab'", "`node` has no field `lables`: did you mean `node.labels`?"),
            ("node.gpus > 0", "did you mean `node.gpu`?"),
            ("node.gpu > 0", "compares `node.gpu` with a whole number"),
            ("node.gpu.modle == 'A100'", "`node.gpu` has no field `modle`: did you mean `node.gpu.model`?"),
            ("node.zone == 'lab'", "labels are `node.labels.zone`; known are name,"),
            ("arch == 'x86_64'", "|arch == 'x86_64' the name `arch` is unknown, did you mean `node.arch`?"),
            ("nod.arch == 'x86_64'", "did you mean `node`?"),
            ("node.arch == lab", "node.arch == |lab the name `lab` is unknown: conditions are about `node`"),
            ("node.cores == 'two'", "node.cores |== 'two' compares a number with text"),
            ("node.arch > 2", "compares text with a whole number"),
            ("node.cores", "gives a number, not true or false"),
            ("node.labels.zone", "gives text, not true or false"),
            ("node.arch && true", "is text, where true or false is due"),
            ("node.cores + 2 > 4.0", "computes with a whole number and a fraction"),
            ("node.arch.startWith('x')", "the function `startWith` is unknown: did you mean `startsWith`?"),
            ("node.arch.contains(2)", "`contains` does not take text and a whole number"),
            ("node.arch in node.cores", "`in` does not take text and a number"),
            ("node.arch.exists(c, c == 'x')", "walks over text, which is no list"),
            ("node.arch ==", "is not CEL"),
            ("", "is not CEL"),
            ("node.labels.exists(a, node.labels.exists(b, a == b))", "steps on one node, at most"),
        ] {
            let said = refused(text);
            assert!(said.contains(message), "{text}\n  says   {said}\n  wanted {message}");
        }
        assert!(refused(&format!("'{}' == ''", "x".repeat(2000))).contains("bytes long"));
    }
}
