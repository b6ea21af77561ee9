//! Any bytes as a job file: no panic, bounded errors that a terminal can show, and a job that survives being
//! written back.

use berth_protocol::job;
use berth_protocol::limits::JOB_FILE_ERRORS_MAX;

pub fn job_file(payload: &[u8]) {
    match job::parse(payload, None) {
        Ok(parsed) => {
            let file = job::render(&parsed.spec).to_string();
            // The full form may be too long for a file where the short one was not.
            if file.len() <= berth_protocol::limits::JOB_FILE_BYTES_MAX {
                let again = job::parse(file.as_bytes(), None).expect("what is written back is a job file");
                assert_eq!(again.spec, parsed.spec);
            }
        }
        Err(errors) => {
            assert!((1..=JOB_FILE_ERRORS_MAX).contains(&errors.len()));
            let text = String::from_utf8_lossy(payload);
            let shown = job::show_errors("job.yaml", &text, &errors);
            assert!(!shown.contains(|c: char| c.is_control() && c != '\n'));
        }
    }
}
